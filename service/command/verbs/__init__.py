"""The verbs of the `recofuse` command, one file a trade; each imports what it needs when it is called."""
