"""How many of an aligned cache's scored positions have a target of the teacher's."""

import numpy as np

from decant.schemas import Cache
from decant.schemas.disk.layout import COUNTS

_ROWS = 256


def taught_share(cache: Cache) -> float:
    """Share of the scored positions, of rows spread over the cache; 0 if none is scored."""
    numbers = cache.rows()
    rows = numbers[np.linspace(0, len(numbers) - 1, min(_ROWS, len(numbers))).astype(int)]
    scored = taught = 0
    for row in rows.tolist():
        headless = not cache.manifest.logits.k
        batch = cache.read([row], targets=(COUNTS,) if headless else ())
        held = batch["counts"] > 0 if headless else np.isfinite(batch["topk_logprobs"])
        scored += int(batch["loss_mask"].sum())
        taught += int((held.any(-1) & batch["loss_mask"]).sum())
    return taught / max(scored, 1)
