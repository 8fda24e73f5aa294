"""The quality study: its metrics, its gradients without a cache, its cells and its report."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.quality import angles, judge, report, study, uncached
from benchmarks.quality.__main__ import RESULTS
from benchmarks.quality.run import Workshop, run_cell
from benchmarks.quality.teacher import DenseTeacher, logprobs
from decant.models import open_checkpoint
from decant.trainer.config import Loss
from decant.trainer.loss.objective import Objective, scheduled_values
from decant.trainer.run.student_parameters import graph_and_parameters
from decant.trainer.update.step import mean_gradient
from tests.making.caches import write_corpus, write_teacher

RECORD = {**study.CAPTURES[study.ROWS], "sketch": {"rank": 8}}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    root = tmp_path_factory.mktemp("quality")
    write_corpus(root / "corpus")
    write_teacher(root / "teacher", vocabulary=300)
    # The tiny teacher is 32 wide.
    patch = pytest.MonkeyPatch()
    patch.setitem(study.CAPTURES, study.ROWS, RECORD)
    yield Workshop(
        study.Study(
            work=root / "work",
            teacher=str(root / "teacher"),
            files=(str(root / "corpus" / "*.txt"),),
            sequence_length=64,
            heldout=0.2,
            layers=1,
            updates=4,
            batch_rows=2,
            teacher_dtype="float32",
            seeds=(0,),
        )
    )
    patch.undo()


def test_every_cell_s_settings_survive_its_toml_file(shop):
    for cell in list(study.cells(shop.study))[::7]:  # of every method and temperature some
        # A config's paths are read relative to its file if they lead somewhere.
        study.cache_path(shop.study, cell.capture).mkdir(parents=True, exist_ok=True)
        config = study.train_config(shop.study, cell)
        assert (config.loss.temperature, config.loss.alpha) == (cell.temperature, cell.alpha)
        assert (config.loss.tail, config.data.seed) == (cell.tail, cell.seed)
        assert config.cache.resolve() == (shop.study.work / "caches" / cell.capture).resolve()
    for capture, logits in study.CAPTURES.items():
        stored = study.precompute_config(shop.study, capture).signals.logits
        assert (stored.k, stored.draws) == (logits["k"], logits["draws"])
        assert stored.counts == logits.get("counts", 0)
        assert stored.sketch.rank == logits.get("sketch", {"rank": 0})["rank"]


@pytest.mark.slow
def test_cells_run_once_and_give_a_report(shop):
    cells = {cell.name: cell for cell in study.cells(shop.study)}
    names = [f"{method}-T1-seed0" for method in ("record", "dense", "online")]
    first = {name: run_cell(cells[name], shop) for name in names}
    assert {name: run_cell(cells[name], shop) for name in names} == first
    assert all(np.isfinite(result["kl"]) for result in first.values())
    from rich.console import Console

    report.report(shop.study, console=Console(width=200))
    assert "online" in (shop.study.work / "report.md").read_text()
    assert (shop.study.work / "report.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_dense_gradient_is_the_trainer_s_when_every_token_is_stored(shop):
    cache, teacher = shop.cache(study.ROWS), shop.teacher
    rows = cache.rows(split="train")[:2]
    read = cache.read(rows, signals=())
    dense = np.array(logprobs(teacher, rows))
    order = np.argsort(-dense, axis=-1)
    whole = {
        **read,
        "topk_ids": order.astype(np.int32),
        "topk_logprobs": np.take_along_axis(dense, order, axis=-1),
        "tail_logmass": np.full((*order.shape[:2], 7), -np.inf, np.float32),
    }
    graph, params = graph_and_parameters(open_checkpoint(shop.study.teacher).load())
    params = jax.tree.map(lambda x: x * 1.1, params)
    read, whole = (jax.tree.map(jnp.asarray, batch) for batch in (read, whole))
    loss = Loss(alpha=0.7, temperature=2.0, tail="bucket")
    objective = Objective(graph, loss, vocabulary=teacher.vocabulary)
    value, _, expected = jax.jit(partial(mean_gradient, objective))(
        params, whole, values=scheduled_values(loss, 0, steps=1)
    )
    batch = {**read, "teacher_hidden": teacher.hidden(rows)}
    dense_gradient = jax.jit(partial(uncached.dense_gradient, graph, loss=loss))
    dense_value, gradient = dense_gradient(params, batch, unembedding=teacher.unembedding)
    assert dense_value == pytest.approx(float(value), rel=1e-5)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.slow
def test_rs_kd_s_mean_target_is_the_teacher_s_distribution(shop):
    rows = shop.cache(study.ROWS).rows(split="train")[:16]
    ids = np.concatenate(
        [uncached.draw_ids_of_row(shop.teacher, int(row), draws=512) for row in rows]
    )
    p = np.exp(np.concatenate([logprobs(shop.teacher, rows[i : i + 1])[0] for i in range(16)]))
    frequencies = np.stack([np.bincount(line, minlength=p.shape[1]) / 512 for line in ids])
    likely = (p > 1e-3) & (p < 1 - 1e-3)
    assert likely.sum() > 1000
    p, frequencies = p[likely], frequencies[likely]
    z = (frequencies - p) / np.sqrt(p * (1 - p) / 512)
    # Independent draws have a mean square z-score of 1.
    assert np.mean(z**2) == pytest.approx(1, abs=0.2)


def test_fresh_counts_are_equally_spaced_draws_and_new_at_each_visit():
    generator = np.random.default_rng(0)
    hidden = generator.normal(size=(2, 16, 8)).astype(np.float32)
    unembedding = generator.normal(size=(8, 50)).astype(np.float32)
    teacher = DenseTeacher(hidden, jnp.asarray(unembedding), seconds_per_row=0.0)
    p = np.exp(logprobs(teacher, np.array([1]))[0])
    visits = []
    for visit in range(2):
        key = jax.random.key(visit)
        drawn = uncached.fresh_targets(teacher, np.array([1]), draws=40, key=key)
        counts = np.zeros_like(p)
        for at, (ids, own) in enumerate(
            zip(drawn["count_ids"][0], drawn["counts"][0], strict=True)
        ):
            np.add.at(counts[at], ids, own)
        assert (counts.sum(1) == 40).all()
        # Of equally spaced draws an id gets ⌊N·p⌋ or ⌈N·p⌉; of independent ones it need not.
        assert (np.abs(counts - 40 * p) < 1 + 1e-3).all()
        visits.append(counts)
    assert (visits[0] != visits[1]).any(axis=1).all()


def test_the_metrics_agree_with_a_calculation_by_hand():
    # Two counted positions and one that is not counted, with two tokens.
    student = jnp.log(jnp.array([[0.8, 0.2], [0.6, 0.4], [0.5, 0.5]]))
    teacher = jnp.log(jnp.array([[0.5, 0.5], [0.1, 0.9], [0.5, 0.5]]))
    metrics = judge.metrics(
        jax.tree.map(
            np.asarray,
            judge.sums(student, teacher, jnp.array([0, 1, 0]), jnp.array([True, True, False])),
        )
    )
    kl = 0.5 * np.log(0.5 / 0.8) + 0.5 * np.log(0.5 / 0.2)
    kl += 0.1 * np.log(0.1 / 0.6) + 0.9 * np.log(0.9 / 0.4)
    assert metrics["positions"] == 2
    assert metrics["kl"] == pytest.approx(kl / 2, rel=1e-5)
    assert metrics["ce"] == pytest.approx(-(np.log(0.8) + np.log(0.4)) / 2, rel=1e-5)
    # The teacher's tie goes to token 0, which is the student's first choice too.
    assert metrics["agreement"] == 0.5
    # Confidence 0.8 was right, 0.6 was wrong, in different bins.
    assert metrics["ece"] == pytest.approx((0.2 + 0.6) / 2, rel=1e-5)


def test_angles_of_known_vectors():
    assert angles.angle(np.array([1.0, 0.0]), np.array([1.0, 1.0])) == pytest.approx(45)
    assert angles.angle(np.array([2.0, 0.0]), np.array([1.0, 0.0])) == pytest.approx(0)


def test_the_gap_is_recovered_by_dense_and_not_by_hard_labels():
    results = {
        ("ce", None, 1.0): {0: {"kl": 3.0}},
        ("dense", None, 2.0): {0: {"kl": 1.0}},
        ("bucket", 32, 2.0): {0: {"kl": 1.5}},
    }
    assert report.gap_recovered(results, ("bucket", 32, 2.0)) == [0.75]


def test_no_result_in_the_repository_names_a_place_of_one_machine():
    for path in RESULTS.rglob("*.json"):
        assert " /" not in path.read_text().replace('"', " "), path
