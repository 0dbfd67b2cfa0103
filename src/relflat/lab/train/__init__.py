"""One run: configuration, algorithms, loop, checkpoints, store."""
