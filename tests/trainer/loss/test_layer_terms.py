"""Terms of captured layers, read by `Cache.read`, against formulas written out here."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from decant.models import Decoder, ModelConfig, open_checkpoint
from decant.models.mesh.sharding import teacher_mesh
from decant.trainer.config import AttentionLoss, Data, HiddenLoss, Loss, Optimiser
from decant.trainer.data.batches import Batches
from decant.trainer.loss.batch_fields import loss_fields, signal_fields, to_device
from decant.trainer.loss.chunk_loss import HeadSums
from decant.trainer.loss.layer_pairs import layer_pairs, number_layers
from decant.trainer.loss.objective import Objective, Tables, scheduled_values
from decant.trainer.loss.projections import initial_projections, with_projections
from decant.trainer.run.initial_student import teacher_config
from decant.trainer.run.loss_inputs import principal_directions
from decant.trainer.run.student_parameters import graph_and_parameters
from decant.trainer.update.step import (
    initial_state,
    make_train_step,
    mean_gradient,
)
from tests.formulas.slopes import relative_distance, relative_error

V = 512
SMALL = ModelConfig(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=64,
    tie_embeddings=True,
)
# As wide as the teacher, with as many heads.
TWIN = dataclasses.replace(SMALL, hidden_size=32, num_heads=4, num_kv_heads=2)

MANY = Loss(
    tail="bucket",
    chunk_tokens=64,
    alpha=0.7,
    hidden=(
        HiddenLoss(weight=0.5, student_layers=(0, 2), teacher_layers=(1, -1)),
        HiddenLoss(weight=2.0, kind="cosine"),
    ),
    attention=(
        AttentionLoss(weight=3.0),
        AttentionLoss(kind="kl", student_layers=(1,), teacher_layers=(0,), normalize=False),
    ),
)
CLASSIC = Loss(
    tail="bucket",
    chunk_tokens=64,
    alpha=0.7,
    hidden=(HiddenLoss(weight=0.01, scale="sum"),),
    attention=(
        AttentionLoss(weight=30.0, scale="pairs", normalize=False),
        AttentionLoss(weight=10.0, scale="pairs", average_heads=True),
    ),
)
PROJECTED = Loss(
    tail="bucket",
    chunk_tokens=64,
    hidden=(
        HiddenLoss(student_layers=(1, 2), teacher_layers=(1, 2), projection=True),
        HiddenLoss(weight=0.5, kind="cosine", projection=True),
    ),
    attention=(AttentionLoss(kind="kl", average_heads=True),),
)
ALONG_DIRECTIONS = Loss(
    tail="bucket",
    chunk_tokens=64,
    alpha=0.0,
    hidden=(HiddenLoss(student_layers=(1, 2), teacher_layers=(1, 2)),),
    attention=(AttentionLoss(weight=2.0, average_heads=True),),
)


def packed_rows(cache):
    """Three rows, one with several segments and one with padding."""
    rows = cache.rows(split="train")
    segments = cache.read(rows, signals=())["segment_ids"]
    most, padded = segments.max(1).argmax(), (segments == 0).any(1).argmax()
    assert segments[most].max() > 1
    assert segments[padded].min() == 0
    return rows[[3, most, padded]]


def given(loss, cache, shape, rows, *, tmp_path):
    """The inputs of an update of these rows."""
    model = Decoder(shape, rngs=nnx.Rngs(1))
    model.embedding.set_value(model.embedding[...] * 20)
    model.blocks.query.set_value(model.blocks.query[...] * 100)
    graph, params = graph_and_parameters(model)
    loss = number_layers(loss, cache=cache, teacher=teacher_config(cache), student=shape)
    chosen = layer_pairs(loss, cache=cache, student=shape)
    made = initial_projections(chosen, width=shape.hidden_size, run=tmp_path, seed=0)
    signals = ("logits", *chosen.signals)
    batch = cache.read(rows, signals=signals, decode=False)
    needed = (*loss_fields(loss.tail), *signal_fields(chosen.signals, batch))
    return SimpleNamespace(
        objective=Objective(graph, loss, vocabulary=V, pairs=chosen),
        params=with_projections(params, jax.tree.map(jnp.asarray, made)),
        batch={name: jnp.asarray(batch[name]) for name in needed},
        decoded=cache.read(rows, signals=signals),
        tables=Tables(directions=principal_directions(cache, pairs=chosen, mesh=teacher_mesh())),
    )


# Without LLVM's optimiser, because compiling takes most of the time of these tests.
@partial(
    jax.jit,
    static_argnames=("objective", "microbatches"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def compiled(objective, params, batch, tables, *, microbatches):
    return mean_gradient(
        objective,
        params,
        batch,
        values=scheduled_values(objective.loss, 0, steps=1),
        microbatches=microbatches,
        tables=tables,
    )


def gradient(case, *, microbatches=1, **changes):
    case = SimpleNamespace(**{**vars(case), **changes})
    return compiled(case.objective, case.params, case.batch, case.tables, microbatches=microbatches)


def textbook_terms(case, states, maps, projections):
    """Each term's mean over pairs and counted tokens, in numpy or jax.numpy.

    `states` and `maps` are the student's, by layer. The teacher's are decoded by `Cache.read`.
    """
    xp = np if isinstance(states[2], np.ndarray) else jnp
    decoded, mask = case.decoded, case.decoded["loss_mask"]
    segments = decoded["segment_ids"]
    seen = (segments[:, :, None] == segments[:, None, :]) & np.tri(segments.shape[1], dtype=bool)
    values = []
    for number, term in enumerate(case.objective.loss.hidden):
        terms = []
        layers = zip(term.student_layers, term.teacher_layers, strict=True)
        for at, (ours, theirs) in enumerate(layers):
            x, y = states[ours], np.float64(decoded[f"hidden/{theirs}"])
            if term.projection:
                x = x @ projections[f"hidden-{number}-{at}"]
            elif f"hidden/{theirs}" in case.tables.directions:
                x = x @ np.float64(case.tables.directions[f"hidden/{theirs}"])
            if term.kind == "mse":
                distance = ((x - y) ** 2).sum(-1)
                distance /= 1 if term.scale == "sum" else y.shape[-1]
            else:
                squares = xp.where(mask, (x**2).sum(-1) * (y**2).sum(-1), 1)
                distance = 1 - (x * y).sum(-1) / xp.sqrt(squares)
            terms.append(xp.where(mask, distance, 0).sum() / mask.sum())
        values.append(sum(terms) / len(terms))
    for term in case.objective.loss.attention:
        terms = []
        for ours, theirs in zip(term.student_layers, term.teacher_layers, strict=True):
            q, p = maps[ours], np.float64(decoded[f"attention/{theirs}"])
            if term.average_heads:
                q, p = q.mean(1, keepdims=True), p.mean(1, keepdims=True)
            if term.normalize:
                p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
                q = q / q.sum(-1, keepdims=True)
            if term.scale == "pairs":
                squares = ((q - p) ** 2 * seen[:, None] * mask[:, None, :, None]).sum()
                same = segments[:, :, None] == segments[:, None, :]
                terms.append(squares / (same * mask[:, :, None]).sum())
                continue
            if term.kind == "mse":
                rows = ((q - p) ** 2 * seen[:, None]).sum(-1) / seen.sum(-1)[:, None]
            else:
                some = p > 0
                ratio = xp.log(np.where(some, p, 1)) - xp.log(xp.where(some, q, 1))
                rows = xp.where(some, p * ratio, 0).sum(-1)
            terms.append((rows.mean(1) * mask).sum() / mask.sum())
        values.append(sum(terms) / len(terms))
    return values


def student_side(case, params):
    model = nnx.merge(case.objective.graph, {k: v for k, v in params.items() if k != "projections"})
    rows = (case.batch["segment_ids"], case.batch["positions"])
    _, states = model(case.batch["tokens"], *rows, hidden_layers=(0, 1, 2))
    maps = {block: model.attention_maps(states[block], *rows, layer=block) for block in (0, 1)}
    return states, maps, params.get("projections", {})


@pytest.mark.parametrize(
    ("loss", "shape", "fixture"),
    [
        (MANY, TWIN, "layered_cache"),
        (CLASSIC, TWIN, "layered_cache"),
        pytest.param(PROJECTED, SMALL, "layered_cache", marks=pytest.mark.slow),
        pytest.param(PROJECTED, SMALL, "narrow_cache", marks=pytest.mark.slow),
        (ALONG_DIRECTIONS, TWIN, "narrow_cache"),
    ],
    ids=["as wide", "classic", "projected", "projected onto directions", "along directions"],
)
def test_every_term_s_value_and_gradient_are_the_formula_s(loss, shape, fixture, request, tmp_path):
    cache = request.getfixturevalue(fixture)
    case = given(loss, cache, shape, packed_rows(cache), tmp_path=tmp_path)
    value, totals, whole = gradient(case)
    count = case.decoded["loss_mask"].sum()

    to_float64 = partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    expected = textbook_terms(case, *to_float64(student_side(case, case.params)))
    got = [float(x) / count for x in (*totals.terms.hidden, *totals.terms.attention)]
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-7)
    alpha = loss.first_alpha
    head = (alpha * totals.head.kl + (1 - alpha) * totals.head.ce) / count
    weights = [term.weight for term in (*loss.hidden, *loss.attention)]
    np.testing.assert_allclose(value, head + np.dot(weights, expected), rtol=1e-5)

    # The terms' part of the gradient; the head's part has tests of its own.
    bare = dataclasses.replace(case.objective.loss, hidden=(), attention=())
    student_only = {name: x for name, x in case.params.items() if name != "projections"}
    objective = dataclasses.replace(
        case.objective, loss=bare, pairs=layer_pairs(bare, cache=cache, student=shape)
    )
    _, _, without = gradient(case, objective=objective, params=student_only)
    without = {**jax.tree.map(jnp.zeros_like, case.params), **without}

    def written_out(params):
        return jnp.dot(
            jnp.asarray(weights), jnp.stack(textbook_terms(case, *student_side(case, params)))
        )

    expected = jax.jit(
        jax.grad(written_out), compiler_options={"xla_backend_optimization_level": 0}
    )(case.params)
    added = jax.tree.map(jnp.subtract, whole, without)
    assert relative_error(added, expected) < 2e-4


def test_the_teacher_s_layers_equal_the_stored_ones(layered_cache, layered_root, tmp_path):
    """The teacher as its own student differs by rounding; with crossed layers by far more."""
    rows = layered_cache.rows(split="train")[:2]
    shape = open_checkpoint(layered_root / "teacher").config
    everything = Loss(
        tail="bucket",
        hidden=(HiddenLoss(student_layers=(0, 1, 2), teacher_layers=(0, 1, 2), kind="cosine"),),
        attention=(AttentionLoss(kind="kl"),),
    )
    crossed = Loss(
        tail="bucket",
        hidden=(HiddenLoss(student_layers=(0, 1, 2), teacher_layers=(1, 2, 1), kind="cosine"),),
        attention=(AttentionLoss(kind="kl", student_layers=(0, 1), teacher_layers=(1, 0)),),
    )
    distances = []
    for loss in (everything, crossed):
        case = given(loss, layered_cache, shape, rows, tmp_path=tmp_path)
        graph, case.params = graph_and_parameters(open_checkpoint(layered_root / "teacher").load())
        case.objective = dataclasses.replace(case.objective, graph=graph)
        totals = gradient(case)[1]
        count = totals.head.count
        distances.append(
            [float(totals.terms.hidden[0] / count), float(totals.terms.attention[0] / count)]
        )
    own, other = np.array(distances)
    assert np.all(np.abs(own) < [1e-4, 2e-3])
    assert np.all(other > 10 * np.abs(own))


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        pytest.param(MANY, TWIN, marks=pytest.mark.slow),
        (CLASSIC, TWIN),
        pytest.param(PROJECTED, SMALL, marks=pytest.mark.slow),
    ],
    ids=["as wide", "classic", "projected"],
)
def test_accumulating_microbatches_equals_one_batch(loss, shape, layered_cache, tmp_path):
    """Pieces are full, of five counted tokens or of none; each is divided by all tokens."""
    rows = layered_cache.rows(split="train")[:4]
    case = given(loss, layered_cache, shape, rows, tmp_path=tmp_path)
    mask = case.batch["loss_mask"].at[0, 5:].set(False).at[3].set(False)
    case.batch = {**case.batch, "loss_mask": mask}
    value, totals, whole = gradient(case)
    other, sums, pieces = gradient(case, microbatches=4)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    for one, another in zip(jax.tree.leaves(sums), jax.tree.leaves(totals), strict=True):
        np.testing.assert_allclose(one, another, rtol=1e-6)
    # By norms: an entry in which positions cancel has the rounding error of the largest.
    assert relative_distance(pieces, whole) < 1e-6


def test_rows_without_targets_change_nothing_whatever_is_stored_there(layered_cache, tmp_path):
    """As in a row that capture skipped because the teacher gave NaN."""
    rows = layered_cache.rows(split="train")[:3]
    case = given(MANY, layered_cache, TWIN, rows, tmp_path=tmp_path)
    value, _, expected = gradient(case, batch={name: x[:2] for name, x in case.batch.items()})
    batch = {**case.batch, "loss_mask": case.batch["loss_mask"].at[2].set(False)}
    for name in ("hidden/1", "hidden/2"):
        batch[name] = batch[name].at[2].set(jnp.nan)
    other, _, got = gradient(case, batch=batch)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    assert relative_distance(got, expected) < 1e-6


def test_a_batch_is_read_undecoded_and_only_its_needed_fields_go_to_the_device(narrow_cache):
    batches = Batches(narrow_cache, config=Data(batch_rows=2), signals=("hidden/1", "attention/1"))
    batch = batches.next()
    batches.close()
    assert {str(batch[name].dtype) for name in ("hidden/1", "attention/1")} == {"int8", "bfloat16"}
    there = to_device(
        batch, mesh=teacher_mesh(), tail="bucket", signals=("hidden/1", "attention/1")
    )
    assert set(there) - set(loss_fields("bucket")) == {"hidden/1", "hidden/1-scale", "attention/1"}
    assert set(to_device(batch, mesh=teacher_mesh(), tail="bucket")) == set(loss_fields("bucket"))


def one_update(case):
    """The third update of five, from a state as restored from a checkpoint."""
    step = make_train_step(case.objective, optimiser=Optimiser(), steps=5, tables=case.tables)

    def update(batch):
        state = initial_state(jax.tree.map(jnp.copy, case.params), config=Optimiser())
        return step(state._replace(step=jnp.int32(2)), batch)

    return update


MOVING = Loss(
    tail="bucket",
    alpha=0.5,
    temperature=2.0,
    chunk_tokens=64,
    hidden=(HiddenLoss(weight=0.0, weight_end=4.0, projection=True),),
    attention=(
        AttentionLoss(weight=3.0, average_heads=True),
        AttentionLoss(weight=3.0, average_heads=True, kind="kl"),
    ),
)


def test_a_step_learns_from_terms_reports_them_and_skips_what_is_not_finite(
    layered_cache, tmp_path
):
    rows = layered_cache.rows(split="train")[:2]
    case = given(MOVING, layered_cache, SMALL, rows, tmp_path=tmp_path)
    update = one_update(case)
    state, metrics = update(case.batch)
    assert relative_error(state.params["projections"], case.params["projections"]) > 0
    assert float(metrics["hidden[0].weight"]) == 2.0  # halfway
    assert "attention[0].weight" not in metrics
    # Terms of one kind are reported by their mean without weights.
    expected = (
        0.5 * 4 * metrics["kl_loss"]
        + 0.5 * metrics["ce_loss"]
        + 2.0 * metrics["hidden_state_loss"]
        + 3.0 * 2 * metrics["attention_loss"]
    )
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)

    at = tuple(np.argwhere(np.asarray(case.batch["loss_mask"]))[0])
    odd = case.batch["hidden/2"].at[at].set(jnp.nan)
    state, metrics = update({**case.batch, "hidden/2": odd})
    assert not np.isfinite(metrics["loss"])
    assert metrics["skipped_in_a_row"] == 1
    assert relative_error(state.params, case.params) == 0


def test_a_loss_without_terms_adds_nothing_to_the_program(layered_cache, tmp_path):
    """State, batch and metrics have no entry for terms."""
    rows = layered_cache.rows(split="train")[:2]
    loss = Loss(tail="bucket", chunk_tokens=64)
    case = given(loss, layered_cache, SMALL, rows, tmp_path=tmp_path)
    assert set(case.batch) == set(loss_fields("bucket"))
    state, metrics = one_update(case)(case.batch)
    assert set(metrics) == {
        "loss",
        "kl_loss",
        "ce_loss",
        "agreement",
        "tokens",
        "alpha",
        "temperature",
        "grad_norm",
        "learning_rate",
        "skipped",
        "skipped_in_a_row",
    }
    assert "projections" not in state.params
    lowered = compiled.lower(case.objective, case.params, case.batch, case.tables, microbatches=1)
    leaves = len(jax.tree.leaves(case.params))
    assert len(jax.tree.leaves(lowered.in_avals)) == leaves + len(loss_fields("bucket"))
    assert len(jax.tree.leaves(lowered.out_info)) == 1 + len(HeadSums._fields) + leaves
