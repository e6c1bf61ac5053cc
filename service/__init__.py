"""The model as a service: front ends, queue, workers."""
