"""Where jobs are done: worker, batcher, engine."""
