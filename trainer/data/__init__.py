"""Batches of rows, from one cache or a mixture."""
