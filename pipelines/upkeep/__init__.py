"""Changes to sealed caches: `merge`, `forget`, `remove`, and `gc`, which deletes and overwrites."""
