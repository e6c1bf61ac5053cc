"""Image files to arrays and back, and the names of pairs: numpy and image libraries only, nothing of ours."""
