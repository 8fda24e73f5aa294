"""Principal directions that hidden states are projected onto: found on the sample, or reused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from decant.pipelines.teacher.loaded import DeviceBatch
from decant.schemas.manifest.statistics import share_statistics
from decant.schemas.records.rows import stored_positions
from decant.schemas.signals import HiddenSignal, Signal


@dataclass(frozen=True)
class KnownDirections:
    """Where the directions of an older part are stored.

    Every part of a cache uses the same directions: a student could not learn from states that
    were projected in two ways.
    """

    part: Path
    file: str
    """File name under the part's `statistics/`."""
    sha256: str
    variance_kept: float
    """Share of the variance that these directions keep on the older part's sample."""

    def share_with(self, part: Path) -> None:
        """Give the file to another part. ValueError if it is not the sealed one."""
        try:
            share_statistics(part, self.part, {self.file: self.sha256})
        except ValueError as error:
            raise ValueError(
                f"{error}. If its signal was removed and collected meanwhile, run the same command "
                "again"
            ) from error


def known_directions(
    cache: Path, signals: Mapping[str, Signal], statistics: Mapping[str, str], *, path: str
) -> dict[str, KnownDirections]:
    """Directions of the part at `path` below the cache, by signal name.

    `statistics` maps each of the part's statistics files to its sha256.
    """
    return {
        name: KnownDirections(
            (cache / path).absolute(), s.directions, statistics[s.directions], s.variance_kept
        )
        for name, s in signals.items()
        if isinstance(s, HiddenSignal) and s.directions
    }


class Moments:
    """Observes a run: counts tokens and sums states and their products for each layer.

    The products of one batch are summed on the device in float32, batches on the host in float64.
    """

    def __init__(self, layers: Sequence[int]):
        self.layers = tuple(layers)
        self.tokens = 0
        self._sums: dict[int, np.ndarray] = {}
        self._products: dict[int, np.ndarray] = {}

    def observe(self, batch: DeviceBatch) -> None:
        """Add the batch's states; blocks until the device is done. Ignores a batch with NaN."""
        inputs = batch.inputs
        counted = stored_positions(inputs["segment_ids"], inputs["loss_mask"], xp=jnp)
        moments = {i: jax.device_get(_moments(batch.layers[i], counted)) for i in self.layers}
        if not all(np.isfinite(products).all() for _, products in moments.values()):
            return
        self.tokens += int(counted.sum())
        for layer, (total, products) in moments.items():
            self._sums[layer] = self._sums.get(layer, 0) + total.astype(np.float64)
            self._products[layer] = self._products.get(layer, 0) + products.astype(np.float64)

    def directions(self, layer: int, *, width: int) -> tuple[np.ndarray, float]:
        """Orthonormal directions float32 [D, width], largest variance first, and the share kept.

        They are eigenvectors of the centred covariance. The share is the part of the variance
        around the layer's mean that the `width` directions keep.
        """
        mean = self._sums[layer] / self.tokens
        covariance = self._products[layer] / self.tokens - np.outer(mean, mean)
        variances, vectors = np.linalg.eigh(covariance)
        kept = vectors[:, ::-1][:, :width]
        # The library chooses an eigenvector's sign: we make its largest coordinate positive.
        signs = np.sign(np.take_along_axis(kept, np.abs(kept).argmax(0)[None], 0))
        share = variances[::-1][:width].sum() / variances.sum()
        return (kept * signs).astype(np.float32), float(share)


@jax.jit
def _moments(states, counted):
    states = jnp.where(counted[..., None], states.astype(jnp.float32), 0)
    products = jnp.einsum("btd,bte->de", states, states, precision=lax.Precision.HIGHEST)
    return states.sum((0, 1)), products
