"""Attention against a float64 formula without blocks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decant.models.decoder import attention

SCALE = 8**-0.5  # for the heads of width 8 that `example` makes
attend = jax.jit(partial(attention.attend, scale=SCALE))
blockwise = jax.jit(partial(attention.blockwise, scale=SCALE), static_argnames="block")


def textbook(q, k, v, segments, *, window=99, scale=None, softcap=None, sinks=None):
    """Softmax over every key s ≤ t of the same segment, one query and head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, time, heads, width = q.shape
    group = heads // k.shape[2]
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(batch, time, heads):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t] and s > t - window]
        scores = k[b, seen, h // group] @ q[b, t, h] * (scale or width**-0.5)
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        weights = np.exp(scores - scores.max())
        total = weights.sum() + (0 if sinks is None else np.exp(float(sinks[h]) - scores.max()))
        out[b, t, h] = weights / total @ v[b, seen, h // group]
    return out


def example(*, time=13, heads=6, kv_heads=2, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    q = draw((2, time, heads, 8), np.float32)
    k, v = draw((2, time, kv_heads, 8), np.float32), draw((2, time, kv_heads, 8), np.float32)
    # Three documents and padding; and one document that fills its row.
    packed = np.array([1] * 5 + [2] * 1 + [3] * 4 + [0] * (time - 10))
    segments = np.stack([packed, np.ones(time, int)]).astype(np.int32)
    return tuple(map(jnp.asarray, (q, k, v, segments)))


@pytest.mark.parametrize("block", [1, 4, 5, 13, 64])
def test_any_block_size_gives_the_textbook_result(block):
    q, k, v, segments = example()
    np.testing.assert_allclose(
        blockwise(q, k, v, segments, block=block), textbook(q, k, v, segments), atol=2e-6
    )


@pytest.mark.parametrize("block", [4, 64])
def test_a_sink_takes_its_share_of_each_heads_softmax(block):
    q, k, v, segments = example()
    sinks = jnp.asarray([-30.0, -1.0, 0.0, 1.0, 3.0, 40.0])
    ours = blockwise(q, k, v, segments, sinks=sinks, block=block)
    expected = textbook(q, k, v, segments, sinks=sinks)
    np.testing.assert_allclose(ours, expected, atol=2e-6)
    np.testing.assert_allclose(attend(q, k, v, segments, sinks=sinks), expected, atol=2e-6)
    maps = attention.attention_probabilities(
        q, k, segments, heads=(5, 1), scale=SCALE, sinks=sinks, block=block
    )
    # What is left of one went to the sink.
    assert np.asarray(maps[:, 0]).max() < 1e-15
    without = attention.attention_probabilities(q, k, segments, heads=(1,), scale=SCALE)
    left = np.asarray(maps[:, 1]).sum(-1)
    assert ((left > 0.1) & (left < 1)).all()
    np.testing.assert_allclose(maps[:, 1] / left[..., None], without[:, 0], atol=2e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_query_heads_share_key_heads_in_order(kv_heads):
    q, k, v, segments = example(kv_heads=kv_heads)
    np.testing.assert_allclose(attend(q, k, v, segments), textbook(q, k, v, segments), atol=2e-6)


@pytest.mark.parametrize("block", [1, 5, 64])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_probabilities_are_the_weights_of_the_values(block, kv_heads):
    q, k, _, segments = example(kv_heads=kv_heads)
    # If the values are unit vectors, the output is the weights.
    keys = np.broadcast_to(np.eye(13, dtype=np.float32)[None, :, None], (2, 13, kv_heads, 13))
    expected = textbook(
        jnp.pad(q, ((0, 0),) * 3 + ((0, 5),)) * (13 / 8) ** 0.5,
        jnp.pad(k, ((0, 0),) * 3 + ((0, 5),)),
        keys,
        segments,
    )
    ours = attention.attention_probabilities(
        q, k, segments, heads=(4, 0, 1), scale=SCALE, block=block
    )
    np.testing.assert_allclose(ours, expected.transpose(0, 2, 1, 3)[:, [4, 0, 1]], atol=2e-6)


# Windows shorter and longer than blocks and documents; arrays, as in a scan over blocks.
SETTINGS = [
    {"window": 1},
    {"window": 3},
    {"window": 12},
    {"window": 13},
    {"softcap": 0.7},
    {"scale": 0.9},
    {"window": 4, "scale": 0.9, "softcap": 0.7},
]


@pytest.mark.parametrize("block", [3, 64])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_windows_caps_and_scales_are_those_of_the_formula(settings, block):
    q, k, v, segments = example()
    static = {"scale": SCALE} | {n: x for n, x in settings.items() if n != "window"}
    window = settings.get("window")
    window = None if window is None else jnp.asarray(window)
    explicit = jax.jit(partial(attention.blockwise, block=block, **static))
    expected = textbook(q, k, v, segments, **settings)
    np.testing.assert_allclose(explicit(q, k, v, segments, window), expected, atol=2e-6)
    # If the values are unit vectors, the output is the weights.
    keys = jnp.broadcast_to(jnp.eye(13)[None, :, None], (2, 13, 2, 13))
    padded = [jnp.pad(x, ((0, 0),) * 3 + ((0, 5),)) for x in (q, k)]
    weights = textbook(*padded, keys, segments, **{"scale": SCALE, **settings})
    maps = attention.attention_probabilities(
        q, k, segments, window, heads=range(6), block=block, **static
    )
    np.testing.assert_allclose(maps, weights.transpose(0, 2, 1, 3), atol=2e-6)


@pytest.mark.parametrize("window", [1, 3, 13])
def test_the_fused_call_applies_the_window(window):
    q, k, v, segments = example()
    np.testing.assert_allclose(
        attention.fused(q, k, v, segments, window, scale=0.9, implementation="xla"),
        textbook(q, k, v, segments, window=window, scale=0.9),
        atol=2e-6,
    )


def test_a_row_of_padding_alone_stays_finite():
    q, k, v, _ = example()
    assert np.isfinite(attend(q, k, v, jnp.zeros((2, 13), jnp.int32))).all()


def test_scores_in_the_hundreds_do_not_overflow():
    q, k, v, segments = example()
    np.testing.assert_allclose(
        attend(100 * q, k, v, segments), textbook(100 * q, k, v, segments), atol=2e-4
    )


def test_bfloat16_operands_keep_a_float32_softmax():
    q, k, v, segments = example(time=40)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    ours = attend(q, k, v, segments)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours, np.float32), textbook(q, k, v, segments), atol=0.02)


@pytest.mark.parametrize("settings", [{}, {"window": 4, "softcap": 0.7, "scale": 0.9}], ids=str)
def test_gradients_match_finite_differences_across_blocks_and_documents(settings):
    q, k, v, segments = example(time=12)

    def total(q, k, v):
        static = {"scale": SCALE, **settings}
        window = static.pop("window", None)
        return jnp.sum(jnp.sin(attention.attend(q, k, v, segments, window, **static)))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)
    exact = [np.asarray(x, np.float64) for x in (q, k, v)]
    for i, gradient in enumerate(gradients):
        direction = np.random.default_rng(i).standard_normal(gradient.shape)
        step = [np.zeros_like(x) for x in exact]
        step[i] = 1e-4 * direction
        ends = [
            np.sin(
                textbook(
                    *(x + sign * s for x, s in zip(exact, step, strict=True)), segments, **settings
                )
            )
            for sign in (1, -1)
        ]
        expected = (ends[0].sum() - ends[1].sum()) / 2e-4
        np.testing.assert_allclose(np.vdot(gradient, direction), expected, rtol=1e-5)


def test_the_fused_call_is_the_same_attention():
    # cuDNN needs a GPU; XLA's own implementation of the same call does not.
    q, k, v, segments = example()
    np.testing.assert_allclose(
        attention.fused(q, k, v, segments, scale=SCALE, implementation="xla"),
        textbook(q, k, v, segments),
        atol=2e-6,
    )
