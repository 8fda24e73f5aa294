"""Measures against float64 formulas over the whole vocabulary, for k below and at V."""

import dataclasses
import json
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from decant.models.text.tokenizer import tokenizer_of
from decant.pipelines.capture.rows_only import tokenise_only
from decant.pipelines.config import Corpus, Tokenise
from decant.schemas import open_cache
from decant.schemas.disk.atomic import write_json
from decant.schemas.manifest.manifest import read_manifest, write_manifest
from decant.schemas.records.rows import next_tokens
from decant.trainer.__main__ import main
from decant.trainer.config import Evaluate
from decant.trainer.judging.measures import MeasureInputs, chunk_measures
from decant.trainer.judging.tally import (
    BINS,
    Tally,
    frequency_group,
    frequency_groups,
    position_group,
    position_groups,
)
from decant.trainer.judging.whole import token_shares
from decant.trainer.loss.targets import BatchTargets
from decant.trainer.results.evaluate import evaluate, read_evaluation
from decant.trainer.results.evaluation_tables import as_table
from decant.trainer.run.metrics_log import read_metrics
from decant.trainer.run.trained_student import load_student, weights_sha256
from tests.formulas.dense import log_softmax
from tests.making.caches import tiny_cache, write_corpus, write_teacher
from tests.trainer.update.test_step import teacher_logits

T, NODE = 2.0, 3  # β = 1/2 is the fourth node of the prior


@pytest.fixture(scope="module")
def run(noisy_run, tmp_path_factory):
    """A copy of the run, so that its `evaluation.json` belongs to this module."""
    return shutil.copytree(noisy_run.run, tmp_path_factory.mktemp("judged") / "run")


@pytest.fixture(scope="module")
def counted(run, drawn_cache, root):
    """Arrays over counted held-out positions: float64 logits of both models, labels, draws."""
    batch = {k: jnp.asarray(v) for k, v in drawn_cache.read(heldout(drawn_cache)).items()}
    graph, params = load_student(run, dtype="float32")
    model = nnx.merge(graph, params)
    hidden, _ = model(batch["tokens"], batch["segment_ids"], batch["positions"])
    student = np.asarray(hidden, np.float64) @ np.asarray(model.unembedding(), np.float64)
    mask = np.asarray(batch["loss_mask"])
    draws = ("tail_ids", "tail_logweights")
    return {
        "teacher": np.asarray(teacher_logits(drawn_cache, root, batch), np.float64)[mask],
        "student": student[mask],
        "labels": next_tokens(np.asarray(batch["tokens"]))[mask],
        "positions": np.asarray(batch["positions"])[mask],
        **{name: np.asarray(batch[name])[mask] for name in draws},
    }


def heldout(cache):
    return cache.rows(split="heldout")


def expected(counted, *, k, prior=None, chosen=slice(None)):
    """Means by formulas over the whole vocabulary; `prior` is π [nodes, V]."""
    z, s = counted["teacher"][chosen], counted["student"][chosen]
    labels = counted["labels"][chosen]
    n = np.arange(len(z))
    order = np.argsort(-z, axis=-1, kind="stable")
    head = np.zeros(z.shape, bool)
    np.put_along_axis(head, order[:, :k], True, axis=-1)

    def kls(temperature, node):
        p, q = (np.exp(log_softmax(x / temperature)) for x in (z, s))
        t, tau = (np.where(head, 0, x).sum(-1) for x in (p, q))
        in_head = np.where(head, p * np.log(p / q), 0).sum(-1)
        if k == z.shape[-1]:
            return in_head, in_head, p, q, t, tau
        bound = in_head + t * np.log(t / tau)
        spread = np.where(head, 0, prior[node])
        spread = t[:, None] * spread / spread.sum(-1, keepdims=True)
        whole = np.where(head, p, spread)
        return bound, (whole * np.log(whole / q)).sum(-1), p, q, t, tau

    bound, estimate, p, q, t, tau = kls(1.0, -1)
    warm_bound, warm_estimate, *_ = kls(T, NODE)
    ids = counted["tail_ids"][chosen]
    if k < z.shape[-1]:
        omega = np.take_along_axis(p, ids, -1) * np.exp(counted["tail_logweights"][chosen])
        inside = np.log(np.take_along_axis(p / t[:, None], ids, -1))
        inside -= np.log(np.take_along_axis(q / tau[:, None], ids, -1))
        unbiased = (bound + (omega * inside).sum(-1)).mean()
    else:
        unbiased = None
    ours = np.argsort(-s, axis=-1, kind="stable")
    top5 = [len(set(a) & set(b)) / 5 for a, b in zip(order[:, :5], ours[:, :5], strict=True)]
    ce = -np.log(q[n, labels])
    low = np.where(head, np.minimum(p, q), 0).sum(-1)
    return {
        "tokens": len(z),
        "kl_bound": bound.mean(),
        "kl_estimate": estimate.mean(),
        "kl_unbiased": unbiased,
        "kl_bound_at_temperature": warm_bound.mean(),
        "kl_estimate_at_temperature": warm_estimate.mean(),
        "ce": ce.mean(),
        "perplexity": np.exp(ce.mean()),
        "agreement": (ours[:, 0] == order[:, 0]).mean(),
        "top5_agreement": np.mean(top5),
        "accuracy": (ours[:, 0] == labels).mean(),
        "confidence": q.max(-1).mean(),
        "ece": calibration_error(q.max(-1), ours[:, 0] == labels),
        "acceptance": [low.mean(), (low + np.minimum(t, tau)).mean()],
    }


def calibration_error(confidence, right):
    total = 0.0
    for i in range(BINS):
        here = (confidence >= i / BINS) & (confidence < (i + 1) / BINS)
        if here.any():
            total += here.mean() * abs(confidence[here].mean() - right[here].mean())
    return total


def pi(cache):
    nodes = np.exp(np.asarray(cache.tail_prior(), np.float64))
    return nodes / nodes.sum(-1, keepdims=True)


def whole(evaluation):
    return {k.removeprefix("heldout_"): v for k, v in evaluation.items() if k.startswith("held")}


def same(got, wanted, *, rtol=2e-5):
    """Of a student's measures. Those of the teacher have tests of their own."""
    wanted = {name: value for name, value in wanted.items() if value is not None}
    later = ("teacher_", "kl_by", "kl_error", "bits_per_byte")
    got = {name: value for name, value in got.items() if not name.startswith(later)}
    wanted = {name: value for name, value in wanted.items() if not name.startswith(later)}
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=rtol, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def evaluated(run, drawn_cache):
    """The result of `evaluate`, and `evaluation.json` after it."""
    result = evaluate(Evaluate(run=run, cache=drawn_cache.path, batch_rows=3))
    return result, read_evaluation(run)


@pytest.fixture(scope="module")
def evaluation(evaluated):
    return evaluated[0]


def test_with_a_tail_every_measure_is_its_formula(evaluation, counted, drawn_cache):
    got = whole(evaluation)
    wanted = expected(counted, k=8, prior=pi(drawn_cache))
    same(got, {**wanted, "kl": wanted["kl_unbiased"]})
    assert got["kl_by"] == "draws"
    # The measures are neither trivial nor equal to each other.
    assert got["kl_bound"] > 0.1
    assert 0.05 < got["agreement"] < 0.95
    assert got["kl_bound_at_temperature"] < 0.9 * got["kl_bound"]
    assert evaluation["temperature"] == T


def test_with_every_token_stored_every_measure_is_its_formula(run, counted, whole_cache):
    got = whole(evaluate(Evaluate(run=run, cache=whole_cache.path)))
    wanted = expected(counted, k=512)
    same(got, {**wanted, "kl": wanted["kl_bound"], "kl_dense": wanted["kl_bound"]})
    assert got["kl_by"] == "dense"
    assert got["acceptance"][0] == got["acceptance"][1]


def test_bounds_are_bounds(evaluation, counted):
    truth = expected(counted, k=512)
    got = whole(evaluation)
    assert got["kl_bound"] < truth["kl_bound"]
    assert got["kl_bound_at_temperature"] < truth["kl_bound_at_temperature"]
    low, high = got["acceptance"]
    assert low < truth["acceptance"][0] < high


def test_groups_by_position_are_the_formulas_over_these_positions(evaluation, counted, drawn_cache):
    groups = evaluation["by_position"]
    assert sum(group["tokens"] for group in groups) == evaluation["heldout_tokens"]
    for group in groups:
        group = dict(group)
        start, end = group.pop("position_from"), group.pop("position_to")
        chosen = (counted["positions"] >= start) & (counted["positions"] <= end)
        same(group, expected(counted, k=8, prior=pi(drawn_cache), chosen=chosen), rtol=1e-4)


def test_groups_by_frequency_are_the_formulas_over_these_labels(evaluation, counted, drawn_cache):
    text = drawn_cache.read(drawn_cache.rows(split="train"))
    counts = Counter(next_tokens(text["tokens"])[text["loss_mask"]].tolist())
    shares = np.array([counts[label] / counts.total() for label in counted["labels"].tolist()])
    groups = evaluation["by_frequency"]
    assert len(groups) >= 2
    assert sum(group["tokens"] for group in groups) == evaluation["heldout_tokens"]
    for group in groups:
        group = dict(group)
        low, high = group.pop("share_from"), group.pop("share_to")
        name = group.pop("frequency")
        chosen = (shares == 0) if name == "never" else (shares >= low) & (shares < high)
        same(group, expected(counted, k=8, prior=pi(drawn_cache), chosen=chosen), rtol=1e-4)


def test_bits_per_byte_are_those_of_the_text_that_the_labels_spell(
    evaluation, counted, drawn_cache
):
    tokenizer = tokenizer_of(drawn_cache)
    labels = counted["labels"].tolist()
    text = "".join(tokenizer.decode([i]) for i in labels if i != tokenizer.eos_id)
    assert tokenizer.eos_id in labels  # it has no bytes, but it has to be predicted
    nats = expected(counted, k=8, prior=pi(drawn_cache))["ce"] * len(labels)
    bits = nats / np.log(2) / len(text.encode())
    assert evaluation["heldout_bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_the_training_loops_held_out_metrics_agree(evaluation, run):
    last = [line for line in read_metrics(run) if "heldout_ce" in line][-1]
    assert last["step"] == evaluation["step"] == 2
    names = (
        "kl",
        "kl_unbiased",
        "kl_bound",
        "ce",
        "perplexity",
        "agreement",
        "tokens",
        "bits_per_byte",
    )
    for name in (*names, "teacher_ce", "teacher_ce_bound", "teacher_known", "teacher_accuracy"):
        np.testing.assert_allclose(
            evaluation[f"heldout_{name}"], last[f"heldout_{name}"], rtol=1e-6
        )


def test_an_evaluation_is_kept_in_the_run(evaluated):
    evaluation, kept = evaluated
    assert kept == evaluation
    rows = evaluation["kl_by_row"]
    mean = sum(rows["sums"]) / sum(rows["tokens"])
    assert len(rows["sums"]) == evaluation["rows"]
    assert mean == pytest.approx(evaluation["heldout_kl"], rel=1e-6)
    assert 0 < evaluation["heldout_kl_error"] < evaluation["heldout_kl"]
    bins = evaluation["calibration"]
    assert sum(one["tokens"] for one in bins) == evaluation["heldout_tokens"]


def test_a_cache_of_two_parts_is_evaluated_as_a_whole(evaluation, run, drawn_cache, tmp_path):
    """The second part repeats the rows: every position counts twice and no mean changes."""
    path = shutil.copytree(drawn_cache.path, tmp_path / "two")
    shutil.copytree(path / "parts" / "0000", path / "parts" / "0001")
    manifest = read_manifest(path)
    (part,) = manifest.parts
    two = (part, dataclasses.replace(part, path="parts/0001"))
    write_manifest(path, dataclasses.replace(manifest, parts=two), replaces=manifest.cache_id)
    got = evaluate(Evaluate(run=run, cache=path, batch_rows=3))
    wanted = whole(evaluation) | {"tokens": 2 * evaluation["heldout_tokens"]}
    same(whole(got), wanted, rtol=1e-6)
    np.testing.assert_allclose(token_shares(open_cache(path)), token_shares(drawn_cache))


def test_what_is_masked_or_not_stored_does_not_matter():
    """Eight positions of 20 tokens, k = 3, one stored id missing; two positions are masked."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 20)).astype(np.float32) * 2
    teacher = log_softmax(rng.normal(size=(8, 20)) * 2)
    ids = np.argsort(-teacher, axis=-1)[:, :3].astype(np.int32)
    logprobs = np.take_along_axis(teacher, ids, -1).astype(np.float32)
    logprobs[0, 2] = -np.inf
    betas = np.array([0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1])
    tail = np.ones((8, 20), bool)
    np.put_along_axis(tail, ids, False, axis=-1)
    tail[0, ids[0, 2]] = True
    mass = np.log((tail[..., None] * np.exp(teacher[..., None] * betas)).sum(1))
    mask = np.array([1, 1, 0, 1, 1, 0, 1, 1], bool)
    targets = BatchTargets(
        labels=jnp.asarray(rng.integers(20, size=8)),
        mask=jnp.asarray(mask),
        topk_ids=jnp.asarray(np.where(mask[:, None], ids, 0)),
        topk_logprobs=jnp.asarray(np.where(mask[:, None], logprobs, -np.inf)),
        tail_logmass=jnp.asarray(np.where(mask[:, None], mass, -np.inf), jnp.float32),
    )
    got = jax.jit(chunk_measures)(logits, targets, MeasureInputs(jnp.float32(2.0), None))
    assert got.kl_estimate is None
    assert got.kl_unbiased is None
    q = np.exp(log_softmax(logits))
    p = np.exp(teacher)
    for i in np.flatnonzero(mask):
        chosen = ids[i, : 2 if i == 0 else 3]
        t, tau = 1 - p[i, chosen].sum(), 1 - q[i, chosen].sum()
        kl = (p[i, chosen] * np.log(p[i, chosen] / q[i, chosen])).sum() + t * np.log(t / tau)
        np.testing.assert_allclose(got.kl_bound[i], kl, rtol=1e-4)
        ours = set(np.argsort(-logits[i])[:5])
        np.testing.assert_allclose(got.top5_agreement[i], len(ours & set(chosen)) / len(chosen))
        low = np.minimum(p, q)[i, chosen].sum()
        np.testing.assert_allclose(got.acceptance_low[i], low, rtol=1e-5)
        np.testing.assert_allclose(got.acceptance_high[i], low + min(t, tau), rtol=1e-4)
    assert all(np.isfinite(x).all() for x in got if x is not None)


def test_a_position_without_stored_ids_counts_as_no_agreement():
    """Not even with id 0, which fills columns without a stored id."""
    targets = BatchTargets(
        labels=jnp.array([1]),
        mask=jnp.array([True]),
        topk_ids=jnp.zeros((1, 2), jnp.int32),
        topk_logprobs=jnp.full((1, 2), -jnp.inf),
        tail_logmass=(1 - jnp.array([[0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1]])) * jnp.log(4.0),
    )
    got = jax.jit(chunk_measures)(jnp.array([[3.0, 2, 1, 0]]), targets, MeasureInputs(None, None))
    assert (got.agreement, got.top5_agreement, got.acceptance_low) == (0, 0, 0)
    np.testing.assert_allclose([got.kl_bound[0], got.acceptance_high[0]], [0, 1], atol=1e-6)


def test_of_equal_logits_the_lower_id_is_the_likelier():
    logits = jnp.zeros((1, 9))
    targets = BatchTargets(
        labels=jnp.zeros(1, jnp.int32),
        mask=jnp.ones(1, bool),
        topk_ids=jnp.asarray([[4, 5, 6]], jnp.int32),
        topk_logprobs=jnp.full((1, 3), -2.0),
        tail_logmass=jnp.zeros((1, 7)),
    )
    got = jax.jit(chunk_measures)(logits, targets, MeasureInputs(None, None))
    np.testing.assert_allclose(got.top5_agreement, [1 / 3])  # of 0 … 4 it is 4


def test_groups_of_frequency_and_position_have_their_edges():
    names = [group["frequency"] for group in frequency_groups()]
    shares = np.array([0.5, 0.01, 0.009, 1e-5, 9e-6, 0.0])
    assert [names[i] for i in frequency_group(shares)] == [
        "over 1 in 100",
        "over 1 in 100",
        "1 in 100 to 1 in 1,000",
        "1 in 10,000 to 1 in 100,000",
        "under 1 in 100,000",
        "never",
    ]
    groups = position_groups(512)
    places = [0, 1, 2, 3, 4, 255, 256, 511]
    spans = [tuple(groups[i].values()) for i in position_group(np.array(places))]
    assert spans == [(0, 0), (1, 1), (2, 3), (2, 3), (4, 7), (128, 255), (256, 511), (256, 511)]
    assert position_groups(6)[-1] == {"position_from": 4, "position_to": 5}


def test_confidence_of_one_is_in_the_last_bin():
    tally = Tally([{}])
    one = {name: np.ones(2, np.float32) for name in ("ce", "confidence", "accuracy")}
    one |= {"acceptance_low": np.zeros(2), "acceptance_high": np.ones(2)}
    tally.add(np.zeros(2, np.int64), one)
    (bin_,) = tally.calibration()
    assert (bin_["to"], bin_["tokens"], tally.means()[0]["ece"]) == (1.0, 2, 0.0)


def test_the_command_prints_json_or_a_table(run, drawn_cache, capsys):
    flags = [f"--run={run}", f"--cache={drawn_cache.path}", "--heldout-rows=1", "--batch-rows=3"]
    assert main(["evaluate", *flags, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"] == 1
    assert main(["evaluate", *flags]) == 0
    table = capsys.readouterr().out
    assert f"next: decant report {run}" in table
    assert f"{printed['heldout_kl_bound']:.4f}" in table
    assert "next token over 1 in 100" in table
    first, details = table.split("all estimates of the KL")
    assert f"{printed['heldout_kl']:.4f}" in first
    assert "KL (draws)" in first
    assert "KL (bound)" not in first
    assert "the teacher" in first
    assert all(f"KL ({name})" in details for name in ("draws", "prior", "bound"))


def test_a_student_of_another_tokenizer_is_refused(run, drawn_cache, tmp_path):
    path = shutil.copytree(run, tmp_path / "run")
    other = write_teacher(tmp_path / "other", vocabulary=400)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(other / name, path / "initial" / name)
    (path / "initial" / "checksums.json").unlink()  # as in runs before 0.8
    with pytest.raises(ValueError, match=r"another tokenizer than the student of .*run has"):
        evaluate(Evaluate(run=path, cache=drawn_cache.path))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A cache of the same text and tokenizer, but of another teacher."""
    root = tmp_path_factory.mktemp("stranger")
    write_teacher(root / "teacher", seed=1)
    return tiny_cache(root)


def test_without_a_cache_a_run_is_judged_on_its_own_wherever_both_are_moved(
    run, drawn_cache, evaluation, tmp_path, monkeypatch
):
    (tmp_path / "runs").mkdir()
    moved = shutil.copytree(run, tmp_path / "runs" / "student")
    shutil.copytree(drawn_cache.path, tmp_path / "runs" / "cache")
    facts = json.loads((moved / "data.json").read_text())
    write_json(moved / "data.json", {"caches": [{**facts["caches"][0], "path": "../cache"}]})
    monkeypatch.chdir(tmp_path)
    assert evaluate(Evaluate(run=moved, batch_rows=3)) == evaluation
    shutil.rmtree(tmp_path / "runs" / "cache")
    with pytest.raises(ValueError, match=r"runs/cache: no such cache directory"):
        evaluate(Evaluate(run=moved))


def test_a_cache_of_another_teacher_must_be_named_and_marks_the_evaluation(run, stranger, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    before = read_evaluation(run)
    teacher = stranger.manifest.logits.teacher_id
    for named in (None, "", teacher[:4], "0123456789ab"):
        with pytest.raises(ValueError, match=f"teacher {teacher[:12]}, but .* --other-teacher"):
            evaluate(Evaluate(run=run, cache=stranger.path, other_teacher=named))
    assert read_evaluation(run) == before
    marked = evaluate(Evaluate(run=run, cache=stranger.path, other_teacher=teacher[:12]))
    assert read_evaluation(run) == marked
    assert (marked["other_teacher"], marked["teacher_id"]) == (True, teacher)
    assert "ANOTHER TEACHER" in str(as_table(marked).title)


def test_an_evaluation_names_cache_teacher_and_weights(evaluation, run, drawn_cache):
    assert evaluation["cache_id"] == drawn_cache.manifest.cache_id
    assert evaluation["teacher_id"] == drawn_cache.manifest.logits.teacher_id
    assert evaluation["other_teacher"] is False
    _, params = load_student(run, dtype="bfloat16")
    assert evaluation["weights"] == weights_sha256(params)
    params["final_norm"] = params["final_norm"] * 2
    assert evaluation["weights"] != weights_sha256(params)


def test_a_run_of_a_release_that_recorded_no_teacher_is_bound_by_its_targets(
    run, drawn_cache, stranger, tmp_path
):
    run = shutil.copytree(run, tmp_path / "run")
    (run / "data.json").unlink()
    assert not evaluate(Evaluate(run=run, cache=drawn_cache.path))["other_teacher"]
    with pytest.raises(ValueError, match="learned from another, which it does not record"):
        evaluate(Evaluate(run=run, cache=stranger.path))


def test_rows_without_targets_judge_nobody(run, drawn_cache, tmp_path):
    corpus = Corpus(files=(str(write_corpus(tmp_path / "text") / "*.txt"),), heldout=0.2)
    tokenise_only(Tokenise(like=drawn_cache.path, corpus=corpus, output=tmp_path / "rows"))
    with pytest.raises(ValueError, match=r"rows: holds rows without a teacher's targets"):
        evaluate(Evaluate(run=run, cache=tmp_path / "rows"))


def test_a_damaged_tail_prior_is_an_error_and_not_a_missing_measure(run, drawn_cache, tmp_path):
    path = shutil.copytree(drawn_cache.path, tmp_path / "cache")
    (prior,) = path.glob("parts/*/statistics/tail-prior-sums.npy")
    content = bytearray(prior.read_bytes())
    content[-1] ^= 1
    prior.write_bytes(content)
    with pytest.raises(ValueError, match=r"tail-prior-sums.npy: checksum mismatch"):
        evaluate(Evaluate(run=run, cache=path))
    manifest = read_manifest(path)
    (part,) = manifest.parts
    kept = {n: sha for n, sha in part.statistics.items() if not n.startswith("tail-prior")}
    old = dataclasses.replace(manifest, parts=(dataclasses.replace(part, statistics=kept),))
    write_manifest(path, old, replaces=manifest.cache_id)
    assert "heldout_kl_estimate" not in evaluate(Evaluate(run=run, cache=path))
