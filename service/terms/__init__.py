"""What all rooms speak in: jobs, errors, settings, images."""
