"""The arithmetic of matrix products: explicit precision, sums in float32; and logits."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def dtype_named(name: str) -> jnp.dtype:
    """The dtype that a config's `dtype` field names. ValueError for other names."""
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; expected one of {', '.join(DTYPES)}.")
    return jnp.dtype(DTYPES[name])


def precision_for(dtype: jnp.dtype) -> jax.lax.Precision:
    """The precision at which no device rounds operands of `dtype` to fewer bits.

    The default for float32 is TF32 on recent NVIDIA GPUs and bfloat16 on TPUs; only
    HIGHEST is float32 everywhere. Products of bfloat16 operands are exact in float32.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def contract(
    equation: str, left: Float[Array, "..."], right: Num[Array, "..."]
) -> Float[Array, "..."]:
    """`jnp.einsum` of two operands in left's dtype, summed and returned in float32.

    The gradient's products take operands in left's dtype too: if left is bfloat16, the incoming
    gradient is rounded to bfloat16. Their sums are float32, and so is the gradient of float32
    weights. int8 weights are exact in bfloat16 and get no gradient.

    Args:
        equation: an explicit equation, "ab,bc->ac". Each axis of one operand must appear in the
            other operand or in the result.
        left: activations; both operands of every product have their dtype.
        right: weights, in any dtype.
    """
    return _contract(equation, jnp.asarray(left), jnp.asarray(right))


# JAX's own rule computes the backward pass of bfloat16 products in float32. That is two thirds of a
# training step at half a GPU's speed or less, and not even float32: GPUs compute it in TF32.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(equation: str, left: Array, right: Array) -> Array:
    return _einsum(equation, left, right.astype(left.dtype))


def _contract_forward(equation: str, left: Array, right: Array) -> tuple[Array, tuple]:
    return _contract(equation, left, right), (left, right)


def _contract_backward(equation: str, kept: tuple, gradient: Array) -> tuple[Array, Array | None]:
    left, right = kept
    operands, out = equation.split("->")
    first, second = operands.split(",")
    gradient = gradient.astype(left.dtype)
    d_left = _einsum(f"{out},{second}->{first}", gradient, right.astype(left.dtype))
    if not jnp.issubdtype(right.dtype, jnp.floating):
        return d_left.astype(left.dtype), None
    d_right = _einsum(f"{first},{out}->{second}", left, gradient)
    return d_left.astype(left.dtype), d_right.astype(right.dtype)


_contract.defvjp(_contract_forward, _contract_backward)


def _einsum(equation: str, left: Array, right: Array) -> Array:
    precision = precision_for(left.dtype)
    return jnp.einsum(
        equation, left, right, precision=precision, preferred_element_type=jnp.float32
    )


def logits(
    hidden: Float[Array, "tokens hidden"],
    unembedding: Float[Array, "hidden vocab"],
    *,
    softcap: float | None,
) -> Float[Array, "tokens vocab"]:
    """Logits of a chunk of positions, in float32. Callers chunk, so [B, T, V] never exists.

    `softcap` is the model's `config.final_softcap`. It has no default, because a caller that
    forgot it would get the logits of another model.
    """
    return soft_cap(contract("td,dv->tv", hidden, unembedding), softcap)


def soft_cap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap · tanh(x / cap): close to x where x is small, and within ±cap. A cap of None gives x."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def soft_cap_slope(capped: Float[Array, "..."], cap: float | None) -> Float[Array, "..."] | float:
    """The derivative of `soft_cap` by x, computed from the value `capped` that it returned."""
    return 1.0 if cap is None else 1 - (capped / cap) ** 2
