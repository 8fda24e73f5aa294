"""The arithmetic every matrix product here obeys: its precision is stated, its sum is float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def dtype_named(name: str) -> jnp.dtype:
    """The dtype of a config's `dtype` field."""
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; expected one of {', '.join(DTYPES)}.")
    return jnp.dtype(DTYPES[name])


def precision_for(dtype: jnp.dtype) -> jax.lax.Precision:
    """Precision that makes operands of `dtype` mean what they say on every device.

    The default for float32 is TF32 on recent NVIDIA GPUs and bfloat16 on TPUs; only
    HIGHEST is float32 everywhere. Products of bfloat16 operands are exact in float32.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def contract(
    equation: str, left: Float[Array, "..."], right: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`jnp.einsum` of two operands in left's dtype, summed and returned in float32."""
    return jnp.einsum(
        equation,
        left,
        right.astype(left.dtype),
        precision=precision_for(left.dtype),
        preferred_element_type=jnp.float32,
    )


def logits(
    hidden: Float[Array, "tokens hidden"], unembedding: Float[Array, "hidden vocab"]
) -> Float[Array, "tokens vocab"]:
    """Logits of some positions in float32; callers chunk the tokens, [B, T, V] never exists."""
    return contract("td,dv->tv", hidden, unembedding)
