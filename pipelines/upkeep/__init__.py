"""Changes to sealed caches: merge, forget, remove, collect garbage."""
