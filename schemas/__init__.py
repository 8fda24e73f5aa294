"""What a cache stores, what it means, and how it is opened. Needs neither jax nor Beam."""

if __name__ != "decant.schemas":
    raise ImportError(
        f"{__file__}: imported as {__name__!r}; write `import decant.schemas`. Under two names "
        "every class would exist twice."
    )

from decant.schemas.reading.cache import Cache, open_cache
from decant.schemas.targets.targets import BETAS, Targets, tail_logmass_at

__all__ = ["BETAS", "Cache", "Targets", "open_cache", "tail_logmass_at"]
