"""`on_policy`, ULD and GOLD on torch tensors equal float64 formulas, and the trainer's losses."""

from functools import partial

import numpy as np
import pytest

from tests.formulas import by_rank, dense
from tests.making.heads import (
    SIZE,
    THEIRS,
    fused,
    head_inputs,
    head_inputs_with_tail,
    matched_inputs,
    relative,
)

torch = pytest.importorskip("torch")
decant_torch = pytest.importorskip("decant.torch")
policy_terms = pytest.importorskip("decant.torch.on_policy").policy_terms
MOST = pytest.importorskip("decant.torch.on_policy").MOST

pytestmark = pytest.mark.reference


def a_batch(targets, vocabulary, **facts):
    arrays = {n: x for n, x in targets._asdict().items() if x is not None}
    arrays |= {"loss_mask": arrays.pop("mask"), "labels": arrays["labels"].astype(np.int64)}
    if "unmatched" in arrays:
        arrays["unmatched_logprobs"] = arrays.pop("unmatched")
    tensors = {name: torch.tensor(np.asarray(array)) for name, array in arrays.items()}
    return decant_torch.Batch(tensors, vocabulary=vocabulary, **facts)


def ours(hidden, unembedding, batch, **settings):
    """Loss summed over the positions, its gradients by hidden states and [D, V] matrix, metrics."""
    states = torch.tensor(hidden, requires_grad=True)
    matrix = torch.tensor(unembedding.T.copy(), requires_grad=True)
    settings = {"chunk_tokens": 4, "count": 1.0, "return_metrics": True, **settings}
    value, metrics = decant_torch.loss(states, matrix, batch, **settings)
    value.backward()
    return value.item(), states.grad.numpy(), matrix.grad.T.numpy(), metrics


def settings_of(kind, partners):
    return {"divergence": kind, "mix": 0.3} | ({"partners": partners} if kind == "gold" else {})


def formula(kind, k, partner, temperature):
    if kind == "gold":
        return partial(by_rank.known_gold, k=k, partner=partner, mix=0.3, temperature=temperature)
    return lambda p, q: temperature * by_rank.known_uld(p, q, k)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [5, THEIRS])
@pytest.mark.parametrize("kind", ["uld", "gold"])
def test_sorted_probabilities_are_the_formula_in_float64(kind, k, temperature):
    teacher, hidden, unembedding, targets, partner, partners = matched_inputs(k=k)
    given = {"temperature": temperature, "alpha": 0.7}
    batch = a_batch(targets, SIZE)
    own = settings_of(kind, partners) | given
    value, d_hidden, d_unembedding, metrics = ours(hidden, unembedding, batch, **own)
    assert metrics["tokens"] == targets.mask.sum()

    def exact(hidden, unembedding):
        soft = formula(kind, k, partner, temperature)
        return by_rank.loss(teacher, hidden, unembedding, targets, soft, **given)

    assert value == pytest.approx(exact(hidden, unembedding), rel=1e-5)
    rng = np.random.default_rng(1)
    for _ in range(4):
        along = [rng.normal(size=x.shape) * 1e-6 for x in (hidden, unembedding)]
        ends = [exact(hidden + s * along[0], unembedding + s * along[1]) for s in (1, -1)]
        slope = sum((d * x).sum() for d, x in zip((d_hidden, d_unembedding), along, strict=True))
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2, rtol=2e-3, atol=2e-10)


def test_with_every_token_stored_uld_is_the_sum_over_all_ranks():
    teacher, hidden, unembedding, targets, *_ = matched_inputs(k=THEIRS)
    value, *_ = ours(hidden, unembedding, a_batch(targets, SIZE), divergence="uld", alpha=1.0)
    given = {"temperature": 1.0, "alpha": 1.0}
    expected = by_rank.loss(teacher, hidden, unembedding, targets, by_rank.uld, **given)
    assert value == pytest.approx(expected, rel=1e-5)


def test_uld_learns_from_any_cache_with_a_head():
    teacher, hidden, unembedding, targets = head_inputs(k=4, vocabulary=SIZE, length=6)
    value, *_ = ours(hidden, unembedding, a_batch(targets, SIZE), divergence="uld", alpha=1.0)
    soft = partial(by_rank.known_uld, k=4)
    given = {"temperature": 1.0, "alpha": 1.0}
    expected = by_rank.loss(teacher, hidden, unembedding, targets, soft, **given)
    assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["uld", "gold", "forward_kl"])
def test_on_matched_targets_losses_and_metrics_are_the_trainers(kind):
    """Also at positions of whose stored tokens none has a partner."""
    *_, hidden, unembedding, targets, _, partners = matched_inputs(k=5)
    own = targets.topk_logprobs.copy()
    own[0, :2] = -np.inf
    targets = targets._replace(topk_logprobs=own)
    common = {"temperature": 2.0, "alpha": 0.7, "divergence": kind, "mix": 0.3}
    tables = {"partners": partners if kind == "gold" else None}
    value, sums, *gradients = fused(
        hidden, unembedding, targets, chunk_tokens=4, softcap=5.0, **common, **tables
    )
    batch = a_batch(targets, SIZE)
    got, *slopes, metrics = ours(hidden, unembedding, batch, softcap=5.0, **common, **tables)
    assert got == pytest.approx(value, rel=1e-5)
    for a, b in zip(slopes, gradients, strict=True):
        assert relative(a, b) < 1e-5
    for name, total in (("kl_loss", sums.kl), ("agreement", sums.agreement)):
        assert metrics[name].item() == pytest.approx(float(total / sums.taught), rel=1e-5), name


@pytest.mark.parametrize("anchor", [0.0, 0.3])
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_on_policy_is_the_formula_in_float64(alpha, anchor):
    size = 64
    _, hidden, unembedding, targets, _ = head_inputs_with_tail(None, vocabulary=size, length=12)
    targets.label_logprobs[targets.mask.nonzero()[0][0], targets.mask.nonzero()[1][0]] = -np.inf
    given = {"clip": 0.15, "anchor": anchor, "alpha": alpha}
    batch = a_batch(targets, size)
    for name in ("topk_ids", "topk_logprobs", "tail_logmass"):
        del batch[name]  # it reads none of them
    value, d_hidden, d_unembedding, metrics = ours(
        hidden, unembedding, batch, divergence="on_policy", **given
    )
    rows = (targets.labels, targets.mask, targets.label_logprobs, targets.writer_logprobs)
    logits = hidden.astype(np.float64) @ unembedding
    expected, d_logits = dense.on_policy_loss(logits, *rows, **given)
    assert value == pytest.approx(expected, rel=3e-6)
    assert relative(d_hidden, d_logits @ unembedding.T.astype(np.float64)) < 5e-6
    assert relative(d_unembedding, np.einsum("btd,btv->dv", hidden, d_logits)) < 5e-6
    # The metrics, from their definitions.
    known = np.isfinite(targets.writer_logprobs) & np.isfinite(targets.label_logprobs)
    logq = np.take_along_axis(dense.log_softmax(logits), targets.labels[..., None], -1)[..., 0]
    p, q, w = (x[known].astype(float) for x in (rows[2], logq, rows[3]))
    ratio = np.exp(q - w)
    clipped = ratio * (p - q) > np.clip(ratio, 0.85, 1.15) * (p - q)
    assert 0 < clipped.mean() < 1
    assert metrics["advantage"].item() == pytest.approx((p - q).mean(), rel=1e-5)
    assert metrics["ratio"].item() == pytest.approx(ratio.mean(), rel=1e-5)
    assert metrics["clipped"].item() == pytest.approx(clipped.mean(), rel=1e-5)
    assert metrics["ce_loss"].item() == pytest.approx(-logq[targets.mask].mean(), rel=1e-5)
    assert not {"kl_loss", "agreement"} & metrics.keys()
    if alpha == 1:
        again = ours(hidden, unembedding, batch, divergence="on_policy", **given | {"alpha": None})
        assert again[0] == value


def test_on_policy_has_the_trainers_value_and_gradient():
    _, hidden, unembedding, targets, _ = head_inputs_with_tail(None, vocabulary=64, length=12)
    common = {"alpha": 0.8, "divergence": "on_policy", "tail": None, "clip": 0.1, "anchor": 0.2}
    value, sums, *gradients = fused(hidden, unembedding, targets, **common)
    got, *slopes, metrics = ours(hidden, unembedding, a_batch(targets, 64), **common)
    assert got == pytest.approx(value, rel=1e-5)
    for a, b in zip(slopes, gradients, strict=True):
        assert relative(a, b) < 1e-5
    for name in ("advantage", "ratio", "clipped"):
        expected = float(getattr(sums, name) / sums.taught)
        assert metrics[name].item() == pytest.approx(expected, rel=1e-4), name


def test_finite_however_far_the_student_is_from_the_writer():
    student = torch.tensor([0.0, -300.0, -1e-7, -0.5])
    writer = torch.tensor([-300.0, 0.0, -1e-7, -1000.0])
    for x in policy_terms(student, writer, writer, clip=0.2, anchor=1.0):
        assert torch.isfinite(x).all()
    assert np.exp(MOST) * 1e3 < np.finfo(np.float32).max


def test_gold_needs_the_partners_of_its_cache():
    *_, hidden, unembedding, targets, _, partners = matched_inputs(k=5)
    batch = a_batch(targets, SIZE)
    with pytest.raises(ValueError, match=r"needs partners=cache\.partners\(\)"):
        ours(hidden, unembedding, batch, divergence="gold")
    other = partners._replace(alone=partners.alone[1:])
    with pytest.raises(ValueError, match=r"partners has 39 columns, but .* 40 ids"):
        ours(hidden, unembedding, batch, divergence="gold", partners=other)


def test_tails_that_are_known_at_1_only_serve_no_other_temperature():
    *_, hidden, unembedding, targets = head_inputs(k=4, vocabulary=SIZE, length=6)
    batch = a_batch(targets, SIZE, tail_at_1=True).to("cpu")
    ours(hidden, unembedding, batch, tail="bucket")
    with pytest.raises(ValueError, match=r"at T = 1 only, but temperature is 2\. Use temp"):
        ours(hidden, unembedding, batch, tail="bucket", temperature=2.0)
