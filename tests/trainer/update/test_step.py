"""One update against the dense formula on a captured cache; invariances; skipped updates."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from decant.models import Decoder, ModelConfig, open_checkpoint
from decant.models.mesh.execution import Execution
from decant.models.mesh.sharding import teacher_mesh
from decant.models.numerics import logits as logits_of
from decant.schemas.records.rows import next_tokens
from decant.trainer.config import Data, Loss, Optimiser, Train
from decant.trainer.judging.heldout import make_evaluator, spread_rows
from decant.trainer.loss.batch_fields import loss_fields
from decant.trainer.loss.objective import Objective, Tables, scheduled_values
from decant.trainer.run.student_parameters import graph_and_parameters
from decant.trainer.update.step import (
    initial_state,
    make_train_step,
    mean_gradient,
    updated_state,
)
from tests.formulas import dense
from tests.making.heads import prior_nodes

V = 512
FIELDS = loss_fields("bucket")


def student(seed=1, vocabulary=V, **kwargs):
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=64,
        tie_embeddings=True,
    )
    model = Decoder(config, rngs=nnx.Rngs(seed), **kwargs)
    model.embedding.set_value(model.embedding[...] * 20)
    return graph_and_parameters(model)


# Without LLVM's optimiser, because compiling takes most of the time of these tests.
@partial(
    jax.jit,
    static_argnames=("objective", "microbatches"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def compiled_gradient(objective, params, batch, tables, *, microbatches):
    return mean_gradient(
        objective,
        params,
        batch,
        values=scheduled_values(objective.loss, 0, steps=1),
        microbatches=microbatches,
        tables=tables,
    )


def gradient(graph, params, batch, *, microbatches=1, prior=None, **settings):
    loss = Loss(**{"chunk_tokens": 64, "tail": "bucket", **settings})
    return compiled_gradient(
        Objective(graph, loss, vocabulary=V),
        params,
        {name: batch[name] for name in loss_fields(loss.tail)},
        Tables(prior=prior),
        microbatches=microbatches,
    )


def read(cache, rows):
    return {name: jnp.asarray(array) for name, array in cache.read(rows).items()}


def relative(a, b):
    """Largest difference of two trees as a share of the largest entry of each leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in pairs)


def teacher_logits(cache, root, batch):
    teacher = open_checkpoint(root / "teacher").load()
    hidden, _ = teacher(batch["tokens"], batch["segment_ids"], batch["positions"])
    shape = (*batch["tokens"].shape, V)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return logits_of(flat, teacher.unembedding(), softcap=None).reshape(shape)


def test_a_cache_with_every_token_trains_like_the_dense_formula(whole_cache, root):
    temperature = 4.0
    batch = read(whole_cache, whole_cache.rows(split="train")[:3])
    teacher, mask = teacher_logits(whole_cache, root, batch), batch["loss_mask"]
    labels = next_tokens(batch["tokens"])
    graph, params = student()

    def textbook(params):
        model = nnx.merge(graph, params)
        hidden, _ = model(batch["tokens"], batch["segment_ids"], batch["positions"])
        logits = jnp.einsum("btd,dv->btv", hidden, model.unembedding(), precision="highest")
        logp = jax.nn.log_softmax(teacher / temperature)
        logq = jax.nn.log_softmax(logits / temperature)
        kl = jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
        loss = 0.7 * temperature**2 * kl - 0.3 * picked[..., 0]
        return jnp.sum(loss * mask) / mask.sum()

    step = jax.jit(
        jax.value_and_grad(textbook), compiler_options={"xla_backend_optimization_level": 0}
    )
    expected, expected_gradient = step(params)
    loss, _, got = gradient(graph, params, batch, alpha=0.7, temperature=temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert relative(got, expected_gradient) < 1e-4


def test_held_out_figures_are_those_of_the_dense_formula(whole_cache, root):
    rows = spread_rows(whole_cache.rows(split="heldout"), 5)
    batch = read(whole_cache, rows)
    teacher, mask = teacher_logits(whole_cache, root, batch), batch["loss_mask"]
    graph, params = student()
    model = nnx.merge(graph, params)
    hidden, _ = model(batch["tokens"], batch["segment_ids"], batch["positions"])
    _, kl, ce, *_ = dense.loss(
        teacher,
        hidden,
        model.unembedding(),
        next_tokens(batch["tokens"]),
        mask,
        temperature=1.0,
        alpha=1.0,
        kind="forward_kl",
    )
    agree = np.argmax(hidden @ model.unembedding(), -1) == np.argmax(teacher, -1)
    # Five rows in batches of 2: the last batch has one row and is padded.
    judge = make_evaluator(
        Objective(graph, Loss(chunk_tokens=32), vocabulary=V, execution=Execution(teacher_mesh())),
        cache=whole_cache,
        rows=5,
        batch_rows=2,
    )
    got = judge(params)
    assert got["heldout_tokens"] == mask.sum()
    np.testing.assert_allclose(got["heldout_kl_bound"], kl / mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(got["heldout_ce"], ce / mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(got["heldout_perplexity"], np.exp(ce / mask.sum()), rtol=1e-4)
    np.testing.assert_allclose(got["heldout_agreement"], (agree & mask).sum() / mask.sum())


def with_draws(batch, *, m=4):
    """`batch` with arbitrary tokens outside the top-k as tail draws."""
    rng = np.random.default_rng(0)
    shape = (*batch["tokens"].shape, m)
    stored = np.asarray(batch["topk_ids"])[..., None] == np.arange(V)
    scores = np.where(stored.any(-2), -1, rng.random((*batch["tokens"].shape, V)))
    ids = np.argsort(-scores, axis=-1)[..., :m]
    there = np.asarray(batch["loss_mask"])[..., None] & np.ones(shape, bool)
    return {
        **batch,
        "tail_ids": jnp.asarray(np.where(there, ids, 0), jnp.int32),
        "tail_logprobs": jnp.where(there, jnp.float32(-7.0), -jnp.inf),
        "tail_logweights": jnp.where(there, jnp.float32(4.0), -jnp.inf),
    }


@pytest.mark.parametrize(
    "tail", ["bucket", "sampled", pytest.param("prior", marks=pytest.mark.slow)]
)
def test_accumulating_microbatches_equals_one_batch(cache, tail):
    microbatches = 4
    batch = with_draws(read(cache, cache.rows(split="train")[:4]))
    # Pieces with different numbers of counted tokens, one of them with none.
    batch["loss_mask"] = batch["loss_mask"].at[0, 5:].set(False).at[3].set(False)
    prior = jnp.asarray(prior_nodes()) if tail == "prior" else None
    graph, params = student()
    settings = {"tail": tail, "prior": prior}
    loss, sums, whole = gradient(graph, params, batch, **settings)
    other, other_sums, pieces = gradient(
        graph, params, batch, microbatches=microbatches, **settings
    )
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    assert other_sums.head.count == sums.head.count
    assert relative(pieces, whole) < 1e-6


def test_rows_without_targets_change_nothing(cache):
    batch = read(cache, cache.rows(split="train")[:4])
    batch["loss_mask"] = batch["loss_mask"].at[3].set(False)
    empty = {name: jnp.zeros_like(batch[name][:1]) for name in FIELDS}
    padded = {name: jnp.concatenate([batch[name][:3], empty[name]]) for name in FIELDS}
    graph, params = student()
    loss, sums, expected = gradient(graph, params, batch)
    other, _, got = gradient(graph, params, padded)
    assert sums.head.count == batch["loss_mask"][:3].sum()
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    assert relative(got, expected) < 1e-6


def test_ids_beyond_the_caches_vocabulary_get_no_mass(cache):
    """The extra rows of a padded embedding get no probability and no gradient."""
    batch = read(cache, cache.rows(split="train")[:4])
    graph, params = student(vocabulary=V + 8)
    loss, _, got = gradient(graph, params, batch)
    small_graph, small = student()
    small = {**params, "embedding": params["embedding"][:V]}
    expected, _, _ = gradient(small_graph, small, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert np.all(np.asarray(got["embedding"][V:]) == 0)


def test_bfloat16_computes_near_float32_and_keeps_float32_weights(cache):
    batch = read(cache, cache.rows(split="train")[:4])
    graph, params = student()
    half_graph, _ = student(dtype=jnp.bfloat16)
    loss, _, whole = gradient(graph, params, batch)
    other, _, half = gradient(half_graph, params, batch)
    np.testing.assert_allclose(other, loss, rtol=1e-2)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half))
    assert cosine_between(half, whole) > 0.995


def test_under_bfloat16_weights_and_moments_stay_float32(cache):
    """No array of the new state has the type of matmul operands."""
    half_graph, params = student(dtype=jnp.bfloat16)
    batch = read(cache, cache.rows(split="train")[:2])
    step = make_train_step(
        Objective(half_graph, Loss(tail="bucket"), vocabulary=V), optimiser=Optimiser(), steps=9
    )
    state = initial_state(params, config=Optimiser())
    after, metrics = jax.eval_shape(step.compiled, state, batch, step.tables)
    numbers = [x for x in jax.tree.leaves((after, metrics)) if x.dtype != jnp.int32]
    assert len(numbers) > 3 * len(jax.tree.leaves(params))
    assert {x.dtype for x in numbers} == {jnp.dtype(jnp.float32)}


def cosine_between(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_alpha_zero_is_hard_labels_only(cache):
    batch = read(cache, cache.rows(split="train")[:4])
    graph, params = student()
    loss, sums, got = gradient(graph, params, batch, alpha=0.0)
    other = {**batch, "topk_logprobs": batch["topk_logprobs"] - 3.0}
    _, _, same = gradient(graph, params, other, alpha=0.0)
    np.testing.assert_allclose(loss, sums.head.ce / sums.head.count, rtol=1e-6)
    assert relative(got, same) == 0


def test_an_update_that_is_not_finite_is_skipped_and_counted():
    _, params = student()
    config = Optimiser()
    state = initial_state(params, config=config)
    ones = jax.tree.map(jnp.ones_like, params)
    bad = jax.tree.map(lambda x: x * jnp.nan, ones)

    @jax.jit
    def apply(state, gradient, finite):
        return updated_state(state, gradient, rate=jnp.float32(0.1), finite=finite, config=config)

    first = apply(state, ones, True)
    assert relative(first.params, state.params) > 0
    second = apply(apply(first, bad, False), bad, False)
    for kept, before in ((second.params, first.params), (second.moments, first.moments)):
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, kept, before)))
    assert (int(second.step), int(second.skipped), int(second.skipped_in_a_row)) == (3, 2, 2)
    third = apply(second, ones, True)
    assert (int(third.skipped), int(third.skipped_in_a_row)) == (2, 0)


def test_a_non_finite_gradient_under_a_finite_loss_is_noticed(cache, monkeypatch):
    graph, params = student()
    batch = read(cache, cache.rows(split="train")[:2])

    def exploding(objective, params, batch, **kwargs):
        loss, sums, gradient = mean_gradient(objective, params, batch, **kwargs)
        return loss, sums, {**gradient, "final_norm": gradient["final_norm"] * jnp.inf}

    monkeypatch.setattr("decant.trainer.update.step.mean_gradient", exploding)
    before = np.asarray(params["embedding"])
    step = make_train_step(
        Objective(graph, Loss(tail="bucket"), vocabulary=V), optimiser=Optimiser(), steps=10
    )
    state, metrics = step(initial_state(params, config=Optimiser()), batch)
    assert np.isfinite(metrics["loss"])
    assert metrics["skipped_in_a_row"] == 1
    np.testing.assert_array_equal(state.params["embedding"], before)


def test_alpha_and_temperature_follow_the_step_and_are_reported(cache):
    """An update equals that of a loss with the constant values of its step."""
    batch = read(cache, cache.rows(split="train")[:2])
    graph, params = student()
    moving = Loss(
        alpha=1.0,
        alpha_end=0.5,
        temperature=4.0,
        temperature_end=2.0,
        chunk_tokens=64,
        tail="bucket",
    )
    step = make_train_step(Objective(graph, moving, vocabulary=V), optimiser=Optimiser(), steps=5)
    expected, _, _ = gradient(graph, params, batch, alpha=0.75, temperature=3.0)
    state = initial_state(params, config=Optimiser())
    _, metrics = step(state._replace(step=jnp.int32(2)), batch)  # as restored from a checkpoint
    assert (float(metrics["alpha"]), float(metrics["temperature"])) == (0.75, 3.0)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_a_step_learns_from_the_prior_that_it_was_made_with(cache):
    batch = read(cache, cache.rows(split="train")[:2])
    graph, params = student()
    loss = Loss(tail="prior", alpha=1.0, chunk_tokens=64)
    prior = jnp.asarray(prior_nodes())
    expected, _, _ = gradient(graph, params, batch, alpha=1.0, tail="prior", prior=prior)
    bucket, _, _ = gradient(graph, params, batch, alpha=1.0)
    step = make_train_step(
        Objective(graph, loss, vocabulary=V),
        optimiser=Optimiser(),
        steps=5,
        tables=Tables(prior=prior),
    )
    _, metrics = step(initial_state(params, config=Optimiser()), batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert metrics["loss"] > bucket + 0.005


def test_microbatches_must_divide_the_batch(cache, tmp_path):
    from decant.trainer.run.train import train

    config = Train(
        cache=cache.path,
        run=tmp_path,
        data=Data(batch_rows=4, microbatches=3),
        loss=Loss(tail="bucket"),
    )
    with pytest.raises(ValueError, match=r"batch_rows = 4 .* 3 microbatches"):
        train(config)


@pytest.mark.parametrize(
    ("tail", "divergence"),
    [("sampled", "forward_kl"), pytest.param("prior", "reverse_kl", marks=pytest.mark.slow)],
)
def test_rows_without_a_teacher_s_targets_are_learned_as_at_alpha_zero(cache, tail, divergence):
    """Loss and gradient are means, weighted by counted tokens, of those of both kinds of rows."""
    batch = with_draws(read(cache, cache.rows(split="train")[:3]))
    silent = ("topk_logprobs", "tail_logmass", "tail_logprobs", "tail_logweights")
    for name in silent:
        batch[name] = batch[name].at[2].set(-jnp.inf)
    for name in ("topk_ids", "tail_ids"):
        batch[name] = batch[name].at[2].set(0)

    def only(rows):
        counted = np.isin(np.arange(3), rows)[:, None]
        return {**batch, "loss_mask": batch["loss_mask"] & counted}

    prior = jnp.asarray(prior_nodes()) if tail == "prior" else None
    settings = {"tail": tail, "divergence": divergence, "prior": prior, "temperature": 2.0}
    graph, params = student()
    parts = [
        gradient(graph, params, only([0, 1]), alpha=0.7, **settings),
        gradient(graph, params, only([2]), alpha=0.0, **settings),
    ]
    counts = [float(sums.head.count) for _, sums, _ in parts]
    shares = [count / sum(counts) for count in counts]
    loss, sums, got = gradient(graph, params, batch, alpha=0.7, **settings)
    expected = sum(share * value for share, (value, _, _) in zip(shares, parts, strict=True))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    mean = jax.tree.map(lambda a, b: shares[0] * a + shares[1] * b, parts[0][2], parts[1][2])
    assert relative(got, mean) < 1e-5
    assert (sums.head.count, sums.head.taught) == (sum(counts), counts[0])
    assert sums.head.kl == pytest.approx(float(parts[0][1].head.kl), rel=1e-6)
