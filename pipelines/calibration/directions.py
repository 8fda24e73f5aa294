"""Leading principal directions of a layer's hidden states, from the calibration sample."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from decant.pipelines.teacher.inference import OnDevice
from decant.schemas.records.rows import stored_positions


class Moments:
    """Observes a run: count, sum and sum of products of each layer's states, in float64.

    Products of one batch are summed on the device in float32.
    """

    def __init__(self, layers: Sequence[int]):
        self.layers = tuple(layers)
        self.tokens = 0
        self._sums: dict[int, np.ndarray] = {}
        self._products: dict[int, np.ndarray] = {}

    def see(self, batch: OnDevice) -> None:
        """Add a batch's; waits for it. A batch with NaN is left out."""
        inputs = batch.inputs
        counted = stored_positions(inputs["segment_ids"], inputs["loss_mask"], xp=jnp)
        found = {i: jax.device_get(_moments(batch.layers[i], counted)) for i in self.layers}
        if not all(np.isfinite(products).all() for _, products in found.values()):
            return
        self.tokens += int(counted.sum())
        for layer, (total, products) in found.items():
            self._sums[layer] = self._sums.get(layer, 0) + total.astype(np.float64)
            self._products[layer] = self._products.get(layer, 0) + products.astype(np.float64)

    def directions(self, layer: int, *, width: int) -> tuple[np.ndarray, float]:
        """Orthonormal directions float32 [D, width], by falling variance, and the share kept.

        Those of the centred covariance: the share is of the variance round the layer's mean.
        """
        mean = self._sums[layer] / self.tokens
        covariance = self._products[layer] / self.tokens - np.outer(mean, mean)
        variances, vectors = np.linalg.eigh(covariance)
        kept = vectors[:, ::-1][:, :width]
        # An eigenvector's sign is the library's choice: the largest coordinate is made positive.
        signs = np.sign(np.take_along_axis(kept, np.abs(kept).argmax(0)[None], 0))
        share = variances[::-1][:width].sum() / variances.sum()
        return (kept * signs).astype(np.float32), float(share)


@jax.jit
def _moments(states, counted):
    states = jnp.where(counted[..., None], states.astype(jnp.float32), 0)
    products = jnp.einsum("btd,bte->de", states, states, precision=lax.Precision.HIGHEST)
    return states.sum((0, 1)), products
