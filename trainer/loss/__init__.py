"""Losses from a cache, and the fused head."""
