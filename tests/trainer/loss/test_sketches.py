"""tail = "sketch" against float64 formulas over the whole vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decant.schemas.targets import sketch as numpy_sketch
from decant.schemas.targets.sketch import SketchHead
from decant.trainer.loss.sketches import sketch_tables, tail_logprobs
from tests.formulas import dense
from tests.making.heads import fused, head_inputs, relative, with_sketch

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tv")
SMALL = 96


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_with_an_exact_sketch_the_loss_is_the_dense_one(kind, temperature):
    teacher, hidden, unembedding, targets = head_inputs(k=4, vocabulary=SMALL)
    targets, tables = with_sketch(targets, teacher)
    settings = {"temperature": temperature, "alpha": 0.7, "mix": 0.3}
    value, sums, *gradients = fused(
        hidden, unembedding, targets, sketch=tables, tail="sketch", divergence=kind, **settings
    )
    rows = (teacher, hidden, unembedding, targets.labels, targets.mask)
    expected = dense.loss(*rows, kind=kind, **settings)
    np.testing.assert_allclose(value, expected[0], rtol=5e-6)
    np.testing.assert_allclose(sums.kl, expected[1], rtol=5e-6)
    for ours, theirs in zip(gradients, expected[3:], strict=True):
        assert relative(ours, theirs) < 5e-6


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize(("bases", "softcap"), [(1, None), (3, None), (2, 30.0)])
def test_the_tail_has_its_stored_mass_and_the_shape_of_the_sketch(kind, bases, softcap):
    """Sketches of other logits than the teacher's, so that only the tail's shape is theirs."""
    teacher, hidden, unembedding, targets = head_inputs(k=4, vocabulary=SMALL, batch=3)
    other = teacher + np.random.default_rng(1).normal(size=teacher.shape) * 2
    targets, tables = with_sketch(targets, other, bases=bases, softcap=softcap)
    settings = {"temperature": 2.0, "alpha": 0.7, "mix": 0.3}
    value, sums, *gradients = fused(
        hidden, unembedding, targets, sketch=tables, tail="sketch", divergence=kind, **settings
    )
    ids, *_ = dense.targets(teacher, 4)
    p = dense.with_shape(teacher, ids, other, temperature=2.0)
    rows = (teacher, hidden, unembedding, targets.labels, targets.mask)
    expected = dense.loss(*rows, kind=kind, p=p, **settings)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(sums.kl, expected[1], rtol=1e-5)
    for ours, theirs in zip(gradients, expected[3:], strict=True):
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_an_empty_slot_with_id_0_does_not_hide_token_0_from_the_tail(kind):
    teacher, hidden, unembedding, targets = head_inputs(k=4, vocabulary=SMALL)
    targets, tables = with_sketch(targets, teacher)
    wide = targets._replace(
        topk_ids=np.pad(targets.topk_ids, [(0, 0), (0, 0), (0, 3)]),
        topk_logprobs=np.pad(
            targets.topk_logprobs, [(0, 0), (0, 0), (0, 3)], constant_values=-np.inf
        ),
    )
    settings = {"temperature": 2.0, "sketch": tables, "tail": "sketch", "divergence": kind}
    narrow, padded = (fused(hidden, unembedding, t, **settings) for t in (targets, wide))
    np.testing.assert_allclose(padded[0], narrow[0], rtol=1e-6)
    assert relative(padded[3], narrow[3]) < 1e-6


@pytest.mark.parametrize("bases", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_log_probabilities_of_all_ids_in_numpy_and_in_jax(bases, temperature):
    teacher, _, _, targets = head_inputs(k=4, vocabulary=SMALL)
    targets, tables = with_sketch(targets, teacher, bases=bases)
    expected = np.where(targets.mask[..., None], dense.log_softmax(teacher / temperature), -np.inf)
    flat = jax.tree.map(lambda x: jnp.asarray(x.reshape(-1, *x.shape[2:])), targets)
    ours = tail_logprobs(flat, jax.tree.map(jnp.asarray, tables), temperature=temperature)
    np.testing.assert_allclose(ours, expected.reshape(-1, SMALL), atol=3e-5)
    for row in range(2):
        heads = np.asarray(tables.head).reshape(bases, -1, SMALL)
        head = SketchHead(heads[row % bases], np.asarray(tables.bias)[row % bases])
        theirs = numpy_sketch.tail_logprobs(
            head,
            targets.sketch[row],
            topk_ids=targets.topk_ids[row],
            topk_logprobs=targets.topk_logprobs[row],
            tail_logmass=targets.tail_logmass[row],
            temperature=temperature,
        )
        np.testing.assert_allclose(theirs, expected[row], atol=3e-5)


@pytest.mark.parametrize(
    ("temperature", "factors"),
    [
        (1.0, (0, 0, 1)),
        (2.0, (0, 1, 0)),
        (3.0, (2 / 3, 1 / 3, 0)),
        (4.0, (1, 0, 0)),
        (8.0, (0.5, 0, 0)),
    ],
)
def test_the_offset_at_t_is_between_those_that_are_stored(temperature, factors):
    """In the loss, in JAX and numpy alike; a head without offsets has none beside one with them."""
    teacher, hidden, unembedding, targets = head_inputs(k=4, vocabulary=SMALL)
    targets, tables = with_sketch(targets, teacher, bases=2)
    offsets = np.random.default_rng(2).normal(size=(3, SMALL)).astype(np.float32)
    matrices = np.asarray(tables.head).reshape(2, -1, SMALL)
    plain = [SketchHead(m, b) for m, b in zip(matrices, np.asarray(tables.bias), strict=True)]
    moved = plain[0].bias + np.asarray(factors, np.float32) @ offsets
    by_hand = [SketchHead(plain[0].head, moved), plain[1]]
    stored = [SketchHead(plain[0].head, plain[0].bias, offsets=offsets), plain[1]]
    np.testing.assert_allclose(stored[0].bias_at(temperature), moved, atol=1e-5)
    expected, got = (
        fused(
            hidden,
            unembedding,
            targets,
            sketch=sketch_tables(heads),
            tail="sketch",
            temperature=temperature,
        )
        for heads in (by_hand, stored)
    )
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    assert relative(got[3], expected[3]) < 1e-5
    of_row = {
        "topk_ids": targets.topk_ids[0],
        "topk_logprobs": targets.topk_logprobs[0],
        "tail_logmass": targets.tail_logmass[0],
        "temperature": temperature,
    }
    sketch, flat = targets.sketch[0], jax.tree.map(lambda x: jnp.asarray(x[0]), targets)
    expected = numpy_sketch.tail_logprobs(by_hand[0], sketch, **of_row)
    got = numpy_sketch.tail_logprobs(stored[0], sketch, **of_row)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    ours = tail_logprobs(flat, sketch_tables(stored[:1]), temperature=temperature)
    np.testing.assert_allclose(ours, expected, atol=3e-5)


def test_with_every_id_stored_nothing_is_left_for_the_sketch():
    teacher, _, _, targets = head_inputs(k=SMALL, vocabulary=SMALL)
    head = SketchHead(np.ones((2, SMALL), np.float32), np.zeros(SMALL, np.float32))
    got = numpy_sketch.tail_logprobs(
        head,
        np.ones((24, 2), np.float32),
        topk_ids=targets.topk_ids[0],
        topk_logprobs=targets.topk_logprobs[0],
        tail_logmass=targets.tail_logmass[0],
    )
    expected = np.where(targets.mask[0][:, None], dense.log_softmax(teacher[0]), -np.inf)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"temperature is 0\.5"):
        numpy_sketch.tail_logprobs(
            head,
            np.ones((24, 2), np.float32),
            topk_ids=targets.topk_ids[0],
            topk_logprobs=targets.topk_logprobs[0],
            tail_logmass=targets.tail_logmass[0],
            temperature=0.5,
        )


def test_bases_of_other_ranks_stand_below_each_other():
    heads = [
        SketchHead(np.full((rank, 5), rank, np.float32), np.full(5, -rank, np.float32))
        for rank in (1, 3)
    ]
    tables = sketch_tables(heads)
    np.testing.assert_array_equal(tables.head[:, 0], [1, 0, 0, 3, 3, 3])
    np.testing.assert_array_equal(tables.bias[:, 0], [-1, -3])
    capped = [heads[0], SketchHead(heads[1].head, heads[1].bias, softcap=30.0)]
    with pytest.raises(ValueError, match=r"capped at \['30.0', 'None'\]"):
        sketch_tables(capped)


@pytest.mark.parametrize("gap", [-28.0, 60.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_finite_when_the_sketch_is_far_from_the_head(kind, gap):
    """Logits of ±300 beside a tail of next to nothing, or of nearly everything."""
    teacher = np.zeros((1, 2, 32))
    teacher[..., 0] = -gap
    _, hidden, unembedding, targets = head_inputs(k=1, vocabulary=32, batch=1, length=2)
    ids, logprobs, mass = dense.targets(teacher, 1)
    mask = np.ones((1, 2), bool)
    targets = targets._replace(mask=mask, topk_ids=ids, topk_logprobs=logprobs, tail_logmass=mass)
    far = np.linspace(-300, 300, 32) * np.ones((1, 2, 1))
    targets, tables = with_sketch(targets, far)
    for temperature in (1.0, 4.0):
        value, sums, *gradients = fused(
            hidden,
            unembedding,
            targets,
            temperature=temperature,
            sketch=tables,
            tail="sketch",
            divergence=kind,
        )
        assert np.isfinite(value)
        assert jnp.isfinite(sums.kl)
        assert all(np.isfinite(g).all() for g in gradients)
