"""The arithmetic every matrix product here obeys: its precision is stated, its sum is float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

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
    equation: str, left: Float[Array, "..."], right: Num[Array, "..."]
) -> Float[Array, "..."]:
    """`jnp.einsum` of two operands in left's dtype, summed and returned in float32.

    int8 weights are exact in bfloat16.
    """
    return jnp.einsum(
        equation,
        left,
        right.astype(left.dtype),
        precision=precision_for(left.dtype),
        preferred_element_type=jnp.float32,
    )


def logits(
    hidden: Float[Array, "tokens hidden"],
    unembedding: Float[Array, "hidden vocab"],
    *,
    softcap: float | None,
) -> Float[Array, "tokens vocab"]:
    """Logits of some positions in float32; callers chunk the tokens, [B, T, V] never exists.

    `softcap` is the model's `config.final_softcap`. It has no default: whoever makes logits and
    does not think of it gets those of another model.
    """
    return soft_capped(contract("td,dv->tv", hidden, unembedding), softcap)


def soft_capped(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap · tanh(x / cap): x where it is small, and never beyond ±cap. None: x."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def soft_cap_slope(capped: Float[Array, "..."], cap: float | None) -> Float[Array, "..."] | float:
    """Derivative of `soft_capped` by x, from its value."""
    return 1.0 if cap is None else 1 - (capped / cap) ** 2
