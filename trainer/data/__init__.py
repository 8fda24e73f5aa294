"""Batches of train rows from one cache or a mixture of caches."""
