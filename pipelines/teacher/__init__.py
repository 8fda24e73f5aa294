"""The teacher: finding it, loading it on devices, and computing the outputs that are stored."""
