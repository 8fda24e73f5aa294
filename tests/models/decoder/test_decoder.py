"""The decoder against a float64 formula; packing, hidden layers and dtypes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from decant.models import Decoder, ModelConfig
from decant.models.parameters import parameters_by_path
from tests.making.models import random_decoder

TINY = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=100.0,
    norm_eps=1e-5,
    max_positions=64,
)


def build(config=TINY, **kwargs):
    return random_decoder(config, **kwargs)


@nnx.jit(static_argnames="hidden_layers")
def run(model, tokens, segments, positions, *, hidden_layers=()):
    return model(tokens, segments, positions, hidden_layers=hidden_layers)


def rows():
    """Two packed rows: documents of 5, 4 and 3 tokens with padding; one of 14."""
    tokens = np.random.default_rng(0).integers(0, 50, (2, 14)).astype(np.int32)
    segments = np.array([[1] * 5 + [2] * 4 + [3] * 3 + [0] * 2, [1] * 14], np.int32)
    positions = np.array([[*range(5), *range(4), *range(3), 0, 0], [*range(14)]], np.int32)
    return tokens, segments, positions


def textbook(model, tokens):
    """Hidden states and attention maps of one document, in float64, position by position."""
    c = model.config
    w = {path: np.asarray(p[...], np.float64) for path, p in parameters_by_path(model).items()}

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * weight

    def rotated(vector, position):
        """Coordinates (i, i + half) as a complex number, times e^(i·angle)."""
        half = c.head_dim // 2
        angles = position * c.rope_theta ** (-2 * np.arange(half) / c.head_dim)
        z = (vector[:half] + 1j * vector[half:]) * np.exp(1j * angles)
        return np.concatenate([z.real, z.imag])

    x = w["embedding"][tokens]
    hidden, maps = [x], np.zeros((c.num_layers, c.num_heads, len(tokens), len(tokens)))
    for layer in range(c.num_layers):
        block = {n.removeprefix("blocks."): a[layer] for n, a in w.items() if "blocks" in n}
        y = norm(x, block["attention_norm"])
        q, k, v = (np.einsum("td,dhk->thk", y, block[n]) for n in ("query", "key", "value"))
        if c.qkv_bias:
            q, k, v = q + block["query_bias"], k + block["key_bias"], v + block["value_bias"]
        mixed = np.zeros_like(q)
        for t, h in np.ndindex(len(tokens), c.num_heads):
            shared = h * c.num_kv_heads // c.num_heads
            keys = np.stack([rotated(k[s, shared], s) for s in range(t + 1)])
            scores = np.exp(keys @ rotated(q[t, h], t) / np.sqrt(c.head_dim))
            maps[layer, h, t, : t + 1] = scores / scores.sum()
            mixed[t, h] = maps[layer, h, t, : t + 1] @ v[: t + 1, shared]
        x = x + np.einsum("thk,hkd->td", mixed, block["output"])
        y = norm(x, block["mlp_norm"])
        gate = y @ block["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ block["up"])) @ block["down"]
        hidden.append(x)
    hidden[-1] = norm(x, w["final_norm"])
    return hidden, maps


@pytest.mark.parametrize("bias", [False, True])
def test_every_hidden_layer_is_the_textbook_one(bias):
    model = build(dataclasses.replace(TINY, qkv_bias=bias))
    tokens, segments, positions = rows()
    final, chosen = run(model, tokens, segments, positions, hidden_layers=(0, 1, 2, 3))
    for layer, expected in enumerate(textbook(model, tokens[1])[0]):
        np.testing.assert_allclose(chosen[layer][1], expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(final, chosen[3])


def test_each_packed_document_gives_what_it_gives_alone():
    model = build()
    tokens, segments, positions = rows()
    final, chosen = run(model, tokens, segments, positions, hidden_layers=(1,))
    for start, end in ((0, 5), (5, 9), (9, 12)):
        expected, _ = textbook(model, tokens[0, start:end])
        np.testing.assert_allclose(final[0, start:end], expected[-1], rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(chosen[1][0, start:end], expected[1], rtol=2e-5, atol=2e-6)


@nnx.jit(static_argnames=("layer", "heads"))
def maps_of(model, states, segments, positions, *, layer, heads=None):
    return model.attention_maps(states, segments, positions, layer=layer, heads=heads)


@pytest.mark.parametrize("bias", [False, True])
def test_attention_maps_of_packed_documents_are_each_documents_own(bias):
    model = build(dataclasses.replace(TINY, qkv_bias=bias))
    tokens, segments, positions = rows()
    # The last document is one token, which sees itself and nothing else.
    segments[0, 11], positions[0, 11] = 4, 0
    _, chosen = run(model, tokens, segments, positions, hidden_layers=(0, 1, 2))
    for layer in range(3):
        ours = np.asarray(maps_of(model, chosen[layer], segments, positions, layer=layer))
        expected = np.zeros((4, 14, 14))
        for start, end in ((0, 5), (5, 9), (9, 11), (11, 12)):
            expected[:, start:end, start:end] = textbook(model, tokens[0, start:end])[1][layer]
        np.testing.assert_allclose(ours[0, :, :12], expected[:, :12], atol=2e-6)
        np.testing.assert_array_equal(ours[0, :, 11, 11], 1)
        # Padding sees padding, so its rows are finite too.
        np.testing.assert_allclose(ours.sum(-1), 1, atol=1e-6)


def test_chosen_heads_come_in_the_order_asked_for():
    model = build()
    tokens, segments, positions = rows()
    _, chosen = run(model, tokens, segments, positions, hidden_layers=(1,))
    every = maps_of(model, chosen[1], segments, positions, layer=1)
    some = maps_of(model, chosen[1], segments, positions, layer=1, heads=(3, 0))
    np.testing.assert_allclose(some, every[:, [3, 0]], atol=1e-7)


def test_a_states_gradient_goes_through_the_maps():
    model = build()
    tokens, segments, positions = rows()
    _, chosen = run(model, tokens, segments, positions, hidden_layers=(1,))
    direction = np.random.default_rng(1).standard_normal(chosen[1].shape).astype(np.float32)

    def first_moment(step):
        states = chosen[1] + step * direction
        maps = model.attention_maps(states, segments, positions, layer=1)
        return (maps * np.arange(14)).sum()

    slope = jax.grad(first_moment)(0.0)
    difference = (first_moment(1e-2) - first_moment(-1e-2)) / 2e-2
    assert abs(slope) > 1
    np.testing.assert_allclose(slope, difference, rtol=2e-3)


def test_padding_and_neighbours_change_nothing():
    model = build()
    tokens, segments, positions = rows()
    final, _ = run(model, tokens, segments, positions)
    others = tokens.copy()
    others[0, 12:] = 49
    others[1] = others[1, ::-1]
    again, _ = run(model, others, segments, positions)
    np.testing.assert_array_equal(final[0, :12], again[0, :12])


def test_layers_may_be_chosen_in_any_order_and_minus_one_is_the_last():
    model = build()
    final, chosen = run(model, *rows(), hidden_layers=(-1, 2))
    assert sorted(chosen) == [2, 3]
    np.testing.assert_array_equal(chosen[3], final)
    _, everything = run(model, *rows(), hidden_layers=(0, 1, 2, 3))
    np.testing.assert_array_equal(chosen[2], everything[2])


def test_a_layer_that_does_not_exist_is_refused_with_the_range():
    with pytest.raises(ValueError, match=r"hidden layer 4 .* layers 0 .* to 3"):
        build()(*rows(), hidden_layers=(4,))


def test_the_tied_head_is_the_embedding_transposed_and_has_no_second_matrix():
    model = build(dataclasses.replace(TINY, tie_embeddings=True))
    np.testing.assert_array_equal(model.unembedding(), model.embedding[...].T)
    assert not hasattr(model, "head")
    assert build().unembedding().shape == (16, 50)


def test_bfloat16_stays_near_float32_and_returns_its_own_dtype():
    wide, narrow = build(), build(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    expected, _ = run(wide, *rows())
    ours, chosen = run(narrow, *rows(), hidden_layers=(1,))
    assert ours.dtype == jnp.bfloat16
    assert chosen[1].dtype == jnp.float32  # the residual stream, as the next block reads it
    assert narrow.embedding[...].dtype == jnp.bfloat16
    error = np.asarray(ours, np.float32) - np.asarray(expected)
    assert np.sqrt((error**2).mean()) < 0.05


@pytest.mark.parametrize("experts", [0, 4])
def test_float32_products_ask_for_full_precision_and_bfloat16_ones_for_a_float32_sum(experts):
    config = dataclasses.replace(TINY, num_experts=experts, experts_per_token=min(experts, 2))
    for dtype, wanted in ((jnp.float32, "HIGHEST"), (jnp.bfloat16, "DEFAULT")):
        model = build(config, dtype=dtype)
        program = jax.make_jaxpr(lambda m, t, s, p: m(t, s, p)[0])(model, *rows())
        dots = list(dot_products(program.jaxpr))
        assert len(dots) >= 9
        for dot in dots:
            assert {str(p.name) for p in dot.params["precision"]} == {wanted}
            assert dot.params["preferred_element_type"] == jnp.float32
            assert {v.aval.dtype for v in dot.invars} == {jnp.dtype(dtype)}


def dot_products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from dot_products(inner)


EVERYTHING = {
    "qkv_bias": True,
    "qk_norm": True,
    "post_norms": True,
    "norm_adds_one": True,
    "windows": (3, None),
    "window_rope_theta": 10.0,
    "attention_softcap": 2.0,
    "num_experts": 4,
    "experts_per_token": 2,
    "normalise_experts": True,
}


@pytest.mark.parametrize("switches", [{"qkv_bias": True}, EVERYTHING], ids=["few", "all"])
def test_every_parameter_learns_from_a_loss(switches):
    model = build(dataclasses.replace(TINY, **switches))

    def loss(model):
        hidden, _ = model(*rows())
        return jnp.sum(jnp.cos(hidden @ model.unembedding()))

    for path, gradient in nnx.to_flat_state(nnx.jit(nnx.grad(loss))(model)):
        assert np.abs(gradient[...]).max() > 1e-6, path


def test_a_new_decoder_is_normal_noise_smaller_where_it_adds_to_the_residual_stream():
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    assert np.std(model.blocks.up[...]) == pytest.approx(0.02, rel=0.1)
    assert np.std(model.blocks.down[...]) == pytest.approx(0.02 / np.sqrt(2 * 3), rel=0.1)
    assert not np.array_equal(model.blocks.up[...], model.blocks.gate[...])
    np.testing.assert_array_equal(model.final_norm[...], np.ones(16))
