"""The HTTP face and its page."""
