"""The Open Inference Protocol over both."""
