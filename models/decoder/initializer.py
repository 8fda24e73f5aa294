"""Making new parameters, each with its logical axes."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike


class Initializer:
    """Makes parameters of one dtype; keywords give axes and sizes: `ones(norm=576)`."""

    def __init__(self, rngs: nnx.Rngs, dtype: DTypeLike):
        self.rngs, self.dtype = rngs, jnp.dtype(dtype)

    def normal(self, *, scale: float = 1.0, **axes: int) -> nnx.Param:
        """Normal noise of standard deviation 0.02 · scale."""
        # rbg, because the default generator takes over a second to compile for every new shape
        # on a CPU.
        seed = jnp.tile(jax.random.key_data(self.rngs.params()), 2)
        key = jax.random.wrap_key_data(seed, impl="rbg")
        draw = jax.random.normal(key, tuple(axes.values()), jnp.float32)
        return nnx.Param((draw * (0.02 * scale)).astype(self.dtype), axes=tuple(axes))

    def ones(self, **axes: int) -> nnx.Param:
        """Ones."""
        return nnx.Param(jnp.ones(tuple(axes.values()), self.dtype), axes=tuple(axes))

    def zeros(self, **axes: int) -> nnx.Param:
        """Zeros."""
        return nnx.Param(jnp.zeros(tuple(axes.values()), self.dtype), axes=tuple(axes))

    def filled(self, values: jax.Array, **axes: int) -> nnx.Param:
        """`values`, shaped as the last axes and repeated along the others."""
        shape = tuple(axes.values())
        array = jnp.resize(values, shape).astype(self.dtype)
        return nnx.Param(array, axes=tuple(axes))
