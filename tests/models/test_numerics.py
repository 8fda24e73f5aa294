"""Products sum in float32; their gradients take operands in the dtype of the left operand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decant.models.decoder.activations import activated
from decant.models.numerics import contract

DRAW = np.random.default_rng(0).standard_normal
EQUATIONS = {
    "btd,dhk->bthk": ((2, 5, 8), (8, 3, 4)),
    "bthk,hkd->btd": ((2, 5, 3, 4), (3, 4, 8)),
    "bkgqh,bksh->bkgqs": ((2, 2, 3, 5, 4), (2, 2, 6, 4)),
    "nv,v->n": ((5, 7), (7,)),
}


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-6), ("bfloat16", 2**-7)])
def test_gradients_are_those_of_the_same_product_in_float64(equation, dtype, close):
    left, right = (DRAW(shape) for shape in EQUATIONS[equation])
    out = np.einsum(equation, left, right)
    weights = DRAW(out.shape)
    operands, result = equation.split("->")
    first, second = operands.split(",")
    expected = (
        np.einsum(f"{result},{second}->{first}", weights, right),
        np.einsum(f"{first},{result}->{second}", left, weights),
    )

    def loss(left, right):
        return jnp.sum(contract(equation, left, right) * jnp.asarray(weights, jnp.float32))

    arguments = jnp.asarray(left, dtype), jnp.asarray(right, jnp.float32)
    gradients = jax.grad(loss, argnums=(0, 1))(*arguments)
    assert [x.dtype for x in gradients] == [jnp.dtype(dtype), jnp.float32]
    for mine, theirs in zip(gradients, expected, strict=True):
        error = np.linalg.norm(np.asarray(mine, np.float64) - theirs)
        assert error <= close * np.linalg.norm(theirs)


def test_the_gradient_of_float32_weights_is_not_rounded():
    left, right = jnp.asarray(DRAW((64, 8)), jnp.bfloat16), jnp.asarray(DRAW((8, 4)), jnp.float32)
    gradient = jax.grad(lambda right: jnp.sum(contract("nd,de->ne", left, right)))(right)
    rounded = np.asarray(gradient.astype(jnp.bfloat16), np.float32)
    assert np.any(np.asarray(gradient) != rounded)


def test_no_product_of_a_bfloat16_gradient_has_float32_operands():
    left, right = jnp.asarray(DRAW((8, 16)), jnp.bfloat16), jnp.asarray(DRAW((16, 4)), jnp.float32)

    def loss(left, right):
        return jnp.sum(contract("nd,de->ne", left, right) ** 2)

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(left, right).as_text()
    operands = re.findall(r"dot_general.*: \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\)", program)
    assert operands == [("bf16", "bf16")] * 3


def test_int8_weights_are_exact_and_have_no_gradient():
    left = jnp.asarray(DRAW((5, 8)), jnp.bfloat16)
    right = np.random.default_rng(1).integers(-127, 128, (8, 4)).astype(np.int8)
    product = contract("nd,de->ne", left, jnp.asarray(right))
    np.testing.assert_allclose(product, np.asarray(left, np.float64) @ right, rtol=1e-5)
    gradient = jax.grad(lambda left: jnp.sum(contract("nd,de->ne", left, jnp.asarray(right))))(left)
    expected = np.broadcast_to(right.astype(np.float64).sum(1), (5, 8))
    np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, rtol=2**-8)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + jnp.exp(-x)),
    "gelu_tanh": jax.nn.gelu,
    "gelu": lambda x: x * (1 + jax.scipy.special.erf(x / 2**0.5)) / 2,
}


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize(("dtype", "close"), [("float32", 2e-6), ("bfloat16", 2**-6)])
def test_a_gated_product_has_the_gradient_of_its_formula(activation, dtype, close):
    gate, up, weights = (2 * DRAW((3, 50)) for _ in range(3))
    with jax.enable_x64(True):
        act = ACTIVATIONS[activation]
        formula = lambda gate, up: jnp.sum(act(gate) * up * weights)  # noqa: E731
        expected = jax.grad(formula, argnums=(0, 1))(jnp.asarray(gate), jnp.asarray(up))

    def loss(gate, up):
        product = activated(gate, up, activation=activation, dtype=dtype)
        assert product.dtype == jnp.dtype(dtype)
        return jnp.sum(product.astype(jnp.float32) * jnp.asarray(weights, jnp.float32))

    gradients = jax.grad(loss, argnums=(0, 1))(*(jnp.asarray(x, jnp.float32) for x in (gate, up)))
    for mine, theirs in zip(gradients, expected, strict=True):
        error = np.linalg.norm(np.asarray(mine, np.float64) - np.asarray(theirs))
        assert error <= close * np.linalg.norm(np.asarray(theirs))
