"""The losses for a loop of one's own: equal to the trainer's and to float64 formulas."""

import dataclasses
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import decant
from decant.schemas.targets.unmatched import UNMATCHED
from decant.trainer.config import Data, Loss
from decant.trainer.loss.batch_fields import loss_fields
from decant.trainer.loss.objective import Objective, Tables, means, scheduled_values
from decant.trainer.own_loop.batch import DeviceBatch
from decant.trainer.run.student_parameters import graph_and_parameters
from decant.trainer.update.step import mean_gradient
from tests.formulas import by_rank, dense
from tests.making.heads import SIZE, D, V, head_inputs_with_tail, matched_inputs, relative
from tests.making.models import CONFIG, random_decoder

TAILS = ("bucket", "sampled", "prior", "renormalize")
quickly = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def device_batch(targets, **facts):
    arrays = {"tokens": np.zeros_like(targets.labels), "labels": targets.labels}
    arrays |= {"loss_mask": targets.mask}
    there = {n: a for n, a in targets._asdict().items() if a is not None}
    if "unmatched" in there:
        there[UNMATCHED] = there.pop("unmatched")
    arrays |= {name: there[name] for name in there if name not in ("labels", "mask")}
    return DeviceBatch(
        {name: jnp.asarray(array) for name, array in arrays.items()},
        **{"vocabulary": V, "highest_temperature": 4.0, **facts},
    )


def stored_only(teacher, ids, *, temperature):
    """The teacher's distribution over the stored tokens alone."""
    scaled = np.full(teacher.shape, -np.inf)
    np.put_along_axis(scaled, ids, np.take_along_axis(teacher / temperature, ids, -1), -1)
    return np.exp(dense.log_softmax(scaled))


def of_hidden(hidden, unembedding, batch, prior=None, **settings):
    function = partial(decant.loss, prior=prior, chunk_tokens=16, **settings)
    return quickly(jax.value_and_grad(function, argnums=(0, 1)))(hidden, unembedding, batch)


def of_logits(logits, batch, prior=None, **settings):
    function = partial(decant.loss_on_logits, prior=prior, chunk_tokens=16, **settings)
    return quickly(jax.value_and_grad(function))(logits, batch)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("tail", TAILS)
def test_both_losses_are_the_formula_in_float64(tail, temperature):
    # With every token stored the bucket is empty, and the textbook's formula holds.
    k = V if tail == "bucket" else 8
    teacher, hidden, matrix, targets, tables = head_inputs_with_tail(tail, k=k)
    prior = tables.get("prior")
    settings = {"temperature": temperature, "alpha": 0.7}
    formula, given = dense.loss, {}
    if tail == "sampled":
        formula = dense.sampled_loss
        given = {
            "ids": targets.topk_ids,
            "draws": (targets.tail_ids, targets.tail_logprobs, targets.tail_logweights),
        }
    elif tail == "prior":
        given = {"p": dense.with_prior(teacher, targets.topk_ids, prior, temperature=temperature)}
    elif tail == "renormalize":
        given = {"p": stored_only(teacher, targets.topk_ids, temperature=temperature)}
    total, *_, d_hidden, d_matrix = formula(
        teacher, hidden, matrix, targets.labels, targets.mask, **settings, **given
    )
    count, batch = targets.mask.sum(), device_batch(targets)
    value, (of_states, of_matrix) = of_hidden(hidden, matrix, batch, prior, tail=tail, **settings)
    assert float(value) == pytest.approx(total / count, rel=1e-5)
    assert relative(of_states, d_hidden / count) < 1e-4
    assert relative(of_matrix, d_matrix / count) < 1e-4
    value, d_logits = of_logits(hidden @ matrix, batch, prior, tail=tail, **settings)
    assert float(value) == pytest.approx(total / count, rel=1e-5)
    assert relative(np.asarray(d_logits) @ matrix.T, d_hidden / count) < 1e-4


@pytest.mark.parametrize("tail", ["sampled", "prior"])
def test_the_trainers_loss_and_gradient_on_the_same_batch(cache, tail):
    """A decoder as the student, whose vocabulary is padded and whose logits are capped."""
    with decant.batches(cache, batch_rows=2) as batches:
        batch = next(batches)
    config = dataclasses.replace(CONFIG, vocab_size=520, final_softcap=20.0)
    graph, params = graph_and_parameters(random_decoder(config))
    settings = {"alpha": 0.6, "temperature": 2.0, "tail": tail, "chunk_tokens": 40}
    prior = jnp.asarray(cache.tail_prior()) if tail == "prior" else None

    @quickly
    def trainers(params):
        loss = Loss(**settings)
        return mean_gradient(
            Objective(graph, loss, vocabulary=512),
            params,
            {name: batch[name] for name in loss_fields(tail)},
            values=scheduled_values(loss, 0, steps=1),
            tables=Tables(prior),
        )

    @quickly
    @partial(jax.value_and_grad, has_aux=True)
    def ours(params):
        model = nnx.merge(graph, params)
        hidden, _ = model(batch["tokens"], batch["segment_ids"], batch["positions"])
        return decant.loss(
            hidden, model.unembedding(), batch, **settings, prior=prior, softcap=20.0, has_aux=True
        )

    value, totals, gradient = trainers(params)
    (own, metrics), own_gradient = ours(params)
    assert float(own) == pytest.approx(float(value), rel=1e-6)
    assert metrics == {name: pytest.approx(float(x)) for name, x in means(totals).items()}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), own_gradient, gradient)


def test_the_defaults_are_those_of_the_command_line():
    for function in (decant.loss, decant.loss_on_logits, decant.batches):
        settings = Data() if function is decant.batches else Loss()
        parameters = inspect.signature(function).parameters.values()
        given = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        shared = given.keys() & vars(settings).keys()
        assert {name: given[name] for name in shared} == {n: getattr(settings, n) for n in shared}
        assert len(shared) >= 3


@pytest.mark.parametrize("kind", ["uld", "gold"])
def test_sorted_probabilities_are_the_formula_in_float64(kind):
    teacher, hidden, matrix, targets, partner, partners = matched_inputs(k=5)
    batch = device_batch(targets, vocabulary=SIZE)
    own = {"divergence": kind, "mix": 0.3, "temperature": 2.0, "alpha": 0.7}
    if kind == "gold":
        own["partners"] = partners
        soft = partial(by_rank.known_gold, k=5, partner=partner, mix=0.3, temperature=2.0)
    else:
        soft = lambda p, q: 2 * by_rank.known_uld(p, q, 5)  # noqa: E731

    def exact(hidden, matrix):
        total = by_rank.loss(teacher, hidden, matrix, targets, soft, temperature=2.0, alpha=0.7)
        return total / targets.mask.sum()

    value, gradients = of_hidden(hidden, matrix, batch, **own)
    assert float(value) == pytest.approx(exact(hidden, matrix), rel=1e-5)
    on_logits, d_logits = of_logits(hidden @ matrix, batch, **own)
    assert float(on_logits) == pytest.approx(float(value), rel=1e-6)
    assert relative(np.asarray(d_logits) @ matrix.T, gradients[0]) < 1e-4
    rng = np.random.default_rng(1)
    along = [rng.normal(size=x.shape) * 1e-6 for x in (hidden, matrix)]
    ends = [exact(hidden + s * along[0], matrix + s * along[1]) for s in (1, -1)]
    slope = sum((d * x).sum() for d, x in zip(gradients, along, strict=True))
    assert float(slope) == pytest.approx((ends[0] - ends[1]) / 2, rel=2e-3)


def test_gold_needs_the_partners_of_its_cache():
    *_, targets, _, partners = matched_inputs(k=5)
    batch, logits = device_batch(targets, vocabulary=SIZE), jnp.zeros((*targets.mask.shape, SIZE))
    with pytest.raises(ValueError, match=r"needs partners=cache\.partners\(\)"):
        decant.loss_on_logits(logits, batch, divergence="gold")
    other = partners._replace(alone=partners.alone[1:])
    with pytest.raises(ValueError, match=r"partners has 39 columns, but .* 40 ids"):
        decant.loss_on_logits(logits, batch, divergence="gold", partners=other)


def test_tails_that_are_known_at_1_only_serve_no_other_temperature():
    *_, targets, _ = head_inputs_with_tail("bucket", k=8)
    batch = device_batch(targets, tail_at_1=True)
    logits = jnp.zeros((*targets.mask.shape, V))
    decant.loss_on_logits(logits, batch, tail="bucket")
    for temperature, said in ((2.0, "temperature is 2"), (jnp.float32(1), "is a JAX array")):
        with pytest.raises(ValueError, match=rf"at T = 1 only, but .*{said}"):
            decant.loss_on_logits(logits, batch, tail="bucket", temperature=temperature)


def test_an_optax_loop_learns(cache):
    optimiser = optax.adam(1e-2)
    draw = np.random.default_rng(0).normal
    params = {
        "embedding": jnp.asarray(draw(size=(512, D)), jnp.float32),
        "unembedding": jnp.zeros((D, 512)),
    }
    moments = optimiser.init(params)

    @jax.jit
    def update(params, moments, batch):
        def objective(params):
            return decant.loss(params["embedding"][batch["tokens"]], params["unembedding"], batch)

        value, gradient = jax.value_and_grad(objective)(params)
        changes, moments = optimiser.update(gradient, moments)
        return optax.apply_updates(params, changes), moments, value

    values = []
    for batch in decant.batches(cache, batch_rows=2, epochs=4):
        params, moments, value = update(params, moments, batch)
        values.append(float(value))
    assert np.mean(values[-3:]) < 0.7 * values[0]


def test_a_batch_read_by_hand_will_do(cache):
    """Other loaders read `Cache.read`; the labels are then shifted here."""
    rows = cache.read([0, 1])
    logits = np.random.default_rng(0).normal(size=(*rows["tokens"].shape, 512)).astype(np.float32)
    with_labels = {**rows, "labels": np.roll(rows["tokens"], -1, axis=1)}
    assert float(decant.loss_on_logits(jnp.asarray(logits), rows)) == float(
        decant.loss_on_logits(jnp.asarray(logits), with_labels)
    )


def test_a_smaller_mask_leaves_positions_out(cache):
    with decant.batches(cache, batch_rows=2) as batches:
        batch = next(batches)
    logits = jnp.zeros((*batch["tokens"].shape, 512))
    one_row = batch.replace(loss_mask=batch["loss_mask"].at[1].set(False))
    alone = jax.tree.map(lambda x: x[:1], batch)
    assert float(decant.loss_on_logits(logits, one_row)) == pytest.approx(
        float(decant.loss_on_logits(logits[:1], alone)), rel=1e-6
    )


def test_what_does_not_fit_is_refused(cache):
    with decant.batches(cache, batch_rows=2) as batches:
        drawn = next(batches)
    plain = {name: array for name, array in drawn.items() if not name.startswith("tail_i")}
    logits = jnp.zeros((2, 64, 512))
    on_logits = decant.loss_on_logits
    with pytest.raises(ValueError, match="no draws from the tail, which tail = sampled"):
        on_logits(logits, plain, tail="sampled")
    with pytest.raises(ValueError, match=r"at T up to 2, but temperature is 4, where"):
        on_logits(logits, drawn, temperature=4.0, tail="sampled")
    with pytest.raises(ValueError, match=r"no counts, .* --signals\.logits\.counts 100"):
        on_logits(logits, drawn, tail="counts")
    with pytest.raises(ValueError, match="no sketch, which tail = sketch learns"):
        on_logits(logits, drawn, tail="sketch")
    with pytest.raises(ValueError, match=r"temperature is 0\.5; expected a number, 1 to 1,000"):
        on_logits(logits, drawn, temperature=0.5)
    with pytest.raises(ValueError, match=r"alpha is 1\.5; expected a number, 0 to 1"):
        on_logits(logits, drawn, alpha=1.5)
    with pytest.raises(ValueError, match=r"needs prior=cache\.tail_prior\(\)"):
        on_logits(logits, drawn, tail="prior")
    with pytest.raises(ValueError, match="no other tail takes a prior"):
        on_logits(logits, drawn, tail="bucket", prior=cache.tail_prior())
    with pytest.raises(ValueError, match="reverse_kl with tail = sampled"):
        on_logits(logits, drawn, divergence="reverse_kl", tail="sampled")
    with pytest.raises(ValueError, match=r"has 500 logits a position, but .* 512 ids"):
        on_logits(logits[..., :500], drawn)
    with pytest.raises(ValueError, match=r"shape \(2, 63, 512\); .* shape \(2, 64\)"):
        on_logits(logits[:, 1:], drawn)
    with pytest.raises(ValueError, match=r"this batch: does not say .* --targets matched"):
        on_logits(logits, drawn, divergence="gold")
    with pytest.raises(ValueError, match="divergence is 'kl'; expected one of forward_kl"):
        # Unwrapped, because in tests jaxtyping would refuse it first.
        inspect.unwrap(on_logits)(logits, drawn, divergence="kl", tail="bucket", alpha=0.9)
    with pytest.raises(ValueError, match=r"chunk_tokens is 0; expected"):
        on_logits(logits, drawn, chunk_tokens=0)
    headless = drawn.replace(**{n: drawn[n][..., :0] for n in ("topk_ids", "topk_logprobs")})
    with pytest.raises(ValueError, match=r"no top-k, which tail = bucket .* tail='counts'"):
        on_logits(logits, headless, tail="bucket")
    with pytest.raises(ValueError, match="has 500 logits a position"):
        decant.loss(jnp.zeros((2, 64, D)), jnp.zeros((D, 500)), drawn)
