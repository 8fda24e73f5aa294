"""Reading: from a sealed cache to numpy arrays."""
