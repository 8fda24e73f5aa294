"""Weights that a checkpoint stores in few bits: their layouts, and their real values."""
