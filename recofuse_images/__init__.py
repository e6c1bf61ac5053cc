"""Files to arrays: decoding pictures without torch and without the service."""
