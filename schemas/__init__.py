"""The cache: its format, the meaning of its numbers, and reading it. Imports no jax, no Beam."""

if __name__ != "decant.schemas":
    raise ImportError(
        f"{__file__}: imported as {__name__!r}; write `import decant.schemas`. Imported under "
        "two names, every class would exist twice."
    )

from decant.schemas.reading.cache import Cache, open_cache
from decant.schemas.targets.targets import BETAS, Targets, tail_logmass_at

__all__ = ["BETAS", "Cache", "Targets", "open_cache", "tail_logmass_at"]
