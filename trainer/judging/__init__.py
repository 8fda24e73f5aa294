"""Measures of a student on held-out rows, for the training loop and the command `evaluate`."""
