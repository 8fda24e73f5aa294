"""One training run: the command `train`, its loop, and the files in the run's directory."""
