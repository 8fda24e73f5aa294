"""From a sealed cache to numpy arrays."""
