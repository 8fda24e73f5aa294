"""Distances of attention maps against formulas in float64, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decant.schemas.targets.attention import decode_log, encode_log
from decant.trainer.loss.attention_maps import attention_loss, pair_count
from tests.formulas.slopes import slope

# Two rows: the first has segments of 3, 2 and 1 tokens and padding, the second one segment.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]], np.int32)
B, T = SEGMENTS.shape
# The last token of a segment has no target. Position 2 of the second row is not counted either.
COUNTED = np.array([[1, 1, 0, 1, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1, 0, 0]], bool)
KINDS = ["mse", "kl"]


def visible_keys(b, t):
    return [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t]]


def textbook(student, teacher, counted=COUNTED, *, kind, normalize=False, average_heads=False):
    """Σ over counted queries of the mean over heads, in float64, key by key."""
    student, teacher = np.float64(student), np.float64(teacher)
    if average_heads:
        student, teacher = student.mean(1, keepdims=True), teacher.mean(1, keepdims=True)
    total = 0.0
    for b, t in zip(*np.nonzero(counted), strict=True):
        keys = visible_keys(b, t)
        for h in range(student.shape[1]):
            q, p = student[b, h, t, keys], teacher[b, h, t, keys]
            if normalize:
                q, p = q / q.sum(), p / (p.sum() or 1.0)
            if kind == "mse":
                row = ((q - p) ** 2).sum() / len(keys)
            else:
                row = sum(x * np.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)
            total += row / student.shape[1]
    return total


def maps(heads, seed=0, *, sharp=1.0):
    """Row-stochastic maps over the visible keys, zero elsewhere."""
    scores = np.random.default_rng(seed).normal(size=(B, heads, T, T)) * sharp
    out = np.zeros_like(scores)
    for b in range(B):
        for t in range(T):
            keys = visible_keys(b, t)
            e = np.exp(scores[b, :, t, keys])
            out[b, :, t, keys] = e / e.sum(0)
    return out.astype(np.float32)


def coded(x):
    """`x` as read from a cache; its rows then sum to one within a few percent."""
    return np.asarray(decode_log(encode_log(x)))


def value_and_slope(
    student, teacher, counted=COUNTED, *, kind, normalize=False, average_heads=False
):
    return jax.value_and_grad(
        lambda student: attention_loss(
            student,
            jnp.asarray(teacher),
            jnp.asarray(SEGMENTS),
            jnp.asarray(counted),
            kind=kind,
            normalize=normalize,
            average_heads=average_heads,
        )
    )(jnp.asarray(student))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs", "average_heads"), [(2, 2, False), (2, 2, True), (2, 3, True), (2, 1, True)]
)
def test_value_and_gradient_are_the_formula_s(kind, normalize, ours, theirs, average_heads):
    settings = {"kind": kind, "normalize": normalize, "average_heads": average_heads}
    student, teacher = maps(ours, 1), coded(maps(theirs, 2))
    value, gradient = value_and_slope(student, teacher, **settings)
    np.testing.assert_allclose(value, textbook(student, teacher, **settings), rtol=1e-5)
    expected = slope(lambda x: textbook(x, teacher, **settings), student, step=1e-6)
    np.testing.assert_allclose(gradient, expected, atol=2e-5)
    hidden = np.ones((B, T, T), bool)
    for b, t in zip(*np.nonzero(COUNTED), strict=True):
        hidden[b, t, visible_keys(b, t)] = False
    assert np.all(np.asarray(gradient).transpose(0, 2, 3, 1)[hidden] == 0)


def classic(student, teacher, mask):
    """The online trainer's term: squared differences over pairs of masked tokens and all heads."""
    pairs = mask[:, None, :, None] * mask[:, None, None, :]
    difference = (np.float64(student) - np.float64(teacher)) * pairs
    return (difference**2).sum() / pairs.sum()


@pytest.mark.parametrize("heads", [1, 3])
def test_with_scale_pairs_the_term_of_unpacked_rows_is_the_classic_one(heads):
    """Each row is one document of other length; all of its tokens count, padding does not."""
    mask = np.arange(T)[None] < np.array([[5], [8]])
    segments = jnp.asarray(mask, jnp.int32)
    student, teacher = np.random.default_rng(heads).random((2, B, heads, T, T)).astype(np.float32)
    causal = np.tri(T) * mask[:, None, :, None] * mask[:, None, None, :]
    student, teacher = student * causal, teacher * causal

    def ours(student):
        total = attention_loss(
            student,
            jnp.asarray(teacher),
            segments,
            jnp.asarray(mask),
            kind="mse",
            normalize=False,
            average_heads=False,
            scale="pairs",
        )
        return total / pair_count(segments, jnp.asarray(mask))

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(student))
    weights = np.float64(mask)
    np.testing.assert_allclose(value, classic(student, teacher, weights), rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * (student - teacher) / (5**2 + 8**2), atol=1e-7)


def test_packing_does_not_change_the_term_with_scale_pairs():
    """Documents of 3, 2 and 1 tokens in one row, and in a row each."""
    student, teacher = maps(2, 1), coded(maps(2, 2))
    options = {"kind": "mse", "normalize": False, "average_heads": False, "scale": "pairs"}

    def term(student, teacher, segments, counted):
        segments, counted = jnp.asarray(segments), jnp.asarray(counted)
        arrays = jnp.asarray(student), jnp.asarray(teacher), segments, counted
        return attention_loss(*arrays, **options) / pair_count(segments, counted)

    packed = term(student[:1], teacher[:1], SEGMENTS[:1], COUNTED[:1])
    apart = np.zeros((2, 3, 2, 3, 3), np.float32)
    counted, segments = np.zeros((3, 3), bool), np.zeros((3, 3), np.int32)
    for row, (start, stop) in enumerate([(0, 3), (3, 5), (5, 6)]):
        n = stop - start
        for at, whole in enumerate((student, teacher)):
            apart[at, row, :, :n, :n] = whole[0, :, start:stop, start:stop]
        counted[row, :n], segments[row, :n] = COUNTED[0, start:stop], 1
    # By hand: two counted queries of a document of three tokens, one of a document of two.
    assert float(pair_count(jnp.asarray(SEGMENTS[:1]), jnp.asarray(COUNTED[:1]))) == 2 * 3 + 1 * 2
    np.testing.assert_allclose(term(*apart, segments, counted), packed, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_maps_have_no_distance(kind):
    value, gradient = value_and_slope(maps(2), maps(2), kind=kind)
    assert float(value) == 0.0
    if kind == "mse":
        assert np.all(np.asarray(gradient) == 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_a_query_with_one_visible_key_counts_with_distance_zero(kind, normalize):
    counted = np.zeros((B, T), bool)
    counted[[0, 0, 0, 1], [0, 3, 5, 0]] = True
    settings = {"kind": kind, "normalize": normalize}
    assert all(len(visible_keys(b, t)) == 1 for b, t in zip(*np.nonzero(counted), strict=True))
    value, _ = value_and_slope(maps(2, 1), coded(maps(2, 2)), counted, **settings)
    assert float(value) == 0.0


@pytest.mark.parametrize("normalize", [False, True])
def test_a_key_with_teacher_probability_zero_adds_no_kl_and_no_gradient(normalize):
    """0 · log 0 is 0 (stored as code 0), whatever the student's probability, even 0."""
    student, teacher = maps(2, 1), maps(2, 2)
    teacher[1, :, 4, 1:3] = 0
    student[1, :, 4, 2] = 0
    settings = {"kind": "kl", "normalize": normalize}
    value, gradient = value_and_slope(student, teacher, **settings)
    np.testing.assert_allclose(value, textbook(student, teacher, **settings), rtol=1e-5)
    assert np.all(np.isfinite(gradient))
    if not normalize:
        assert np.all(np.asarray(gradient)[1, :, 4, 1:3] == 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_a_student_probability_of_zero_gives_finite_numbers(kind, normalize):
    student, teacher = maps(2, 1), maps(2, 2)
    student[1, 0, 4, 1] = 0
    value, gradient = value_and_slope(student, teacher, kind=kind, normalize=normalize)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    if kind == "kl":
        # Most of the value is −p · log(1e-30) of one of the two heads.
        assert float(value) > 30 * teacher[1, 0, 4, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_s_row_of_zeros_stays_zero(kind):
    student, teacher = maps(2, 1), maps(2, 2)
    teacher[1, :, 4] = 0
    settings = {"kind": kind, "normalize": True}
    value, gradient = value_and_slope(student, teacher, **settings)
    np.testing.assert_allclose(value, textbook(student, teacher, **settings), rtol=1e-5)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_stored_values_of_uncounted_queries_may_be_anything(kind, normalize):
    settings = {"kind": kind, "normalize": normalize}
    student, teacher = maps(2, 1), maps(2, 2)
    value, gradient = value_and_slope(student, teacher, **settings)
    odd = np.where(COUNTED[:, None, :, None], teacher, np.nan)
    odd = np.where(np.tril(np.ones((T, T), bool)), odd, np.nan)  # and so may later keys
    other, same = value_and_slope(student, odd, **settings)
    assert float(other) == float(value)
    np.testing.assert_array_equal(same, gradient)


def test_half_precision_maps_are_summed_in_float32():
    student, teacher = maps(2, 1), jnp.asarray(maps(2, 2), jnp.bfloat16)
    for kind in KINDS:
        value, _ = value_and_slope(student, teacher, kind=kind, normalize=True)
        expected = textbook(student, teacher, kind=kind, normalize=True)
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_the_kl_has_a_gradient_through_a_sharp_softmax():
    """If a probability underflows, the gradients of the others still pull, and are finite."""
    scores = jnp.zeros((B, 1, T, T)).at[1, 0, 4, 0].set(-300.0)
    seen = jnp.asarray(maps(1) > 0)

    def loss(scores):
        student = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return attention_loss(
            jnp.where(seen, student, 0.0),
            jnp.asarray(maps(1, 2)),
            jnp.asarray(SEGMENTS),
            jnp.asarray(COUNTED),
            kind="kl",
            normalize=True,
            average_heads=False,
        )

    value, gradient = jax.value_and_grad(loss)(scores)
    assert np.isfinite(value)
    assert np.all(np.isfinite(np.asarray(gradient)[np.broadcast_to(seen, scores.shape)]))
