"""The model as graphs that other runtimes load: its form for them, and how it is written to files."""
