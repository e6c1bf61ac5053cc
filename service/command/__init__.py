"""The `recofuse` command and the processes that it starts."""
