"""Kernels of our own for a GPU, written in Triton, each beside an eager twin; chosen only where they agree and win."""
