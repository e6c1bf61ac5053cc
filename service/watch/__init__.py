"""What can be seen from outside: metrics, logs, traces, GPUs."""
