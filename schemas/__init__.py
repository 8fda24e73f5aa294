"""What a cache stores, what it means, and how it is opened. Needs neither jax nor Beam."""

from schemas.cache import Cache, open_cache
from schemas.targets import BETAS, Targets, tail_logmass_at

__all__ = ["BETAS", "Cache", "Targets", "open_cache", "tail_logmass_at"]
