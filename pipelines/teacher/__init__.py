"""The teacher on its devices, and what is kept of its outputs."""
