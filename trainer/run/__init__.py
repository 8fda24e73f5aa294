"""A run: its loop, directory, checkpoints and logs."""
