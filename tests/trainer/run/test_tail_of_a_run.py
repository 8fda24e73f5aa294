"""Runs whose `loss.tail` is chosen: trained, judged, continued, and mixed with other caches."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from decant.schemas import open_cache
from decant.schemas.disk.atomic import write_json
from decant.trainer.config import Data, Evaluate, Loss, MixedCache, Student, Train
from decant.trainer.data.mixture import MixtureReader
from decant.trainer.judging.headline import COUNTS, SKETCH, estimate_of
from decant.trainer.results.evaluate import evaluate
from decant.trainer.run.binding import BINDING, read_run_settings
from decant.trainer.run.data_facts import read_data_facts
from decant.trainer.run.loss_inputs import with_tail
from decant.trainer.run.metrics_log import read_metrics
from decant.trainer.run.train import train
from tests.making.companions import with_companions


@pytest.fixture(scope="module")
def richer(cache, tmp_path_factory):
    """The cache without draws, with counts and sketches of one basis."""
    path = tmp_path_factory.mktemp("richer") / "cache"
    return with_companions(Path(shutil.copytree(cache.path, path)))


def settings(cache, run, root, **changes) -> Train:
    return Train(
        cache=cache.path,
        run=run,
        student=Student(source=str(root / "teacher"), layers=1),
        data=Data(batch_rows=2, steps=2),
        heldout_rows=2,
        **changes,
    )


@pytest.mark.parametrize(("temperature", "tail"), [(1.0, "counts"), (2.0, "sketch")])
def test_a_run_learns_from_the_chosen_tail_and_is_judged_by_counts(
    richer, root, tmp_path, capfd, temperature, tail
):
    config = settings(richer, tmp_path / "run", root, loss=Loss(temperature=temperature))
    train(config)
    assert f"loss.tail is {tail}" in capfd.readouterr().err
    assert read_run_settings(config.run)["loss.tail"] == tail
    assert f"signal_id {tail}" in read_run_settings(config.run)
    assert tail in read_data_facts(config.run)[0]["bytes_per_token"]
    lines = read_metrics(config.run)
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    judged = [line for line in lines if "heldout_kl" in line][-1]
    assert judged["heldout_kl_by"] == "counts" == estimate_of(richer).name
    assert judged["heldout_kl_bound"] <= judged["heldout_ce"]
    evaluation = evaluate(Evaluate(run=config.run, heldout_rows=2))
    for name in ("heldout_kl_counts", "heldout_kl_bound"):
        assert evaluation[name] == pytest.approx(judged[name], rel=1e-4)
    assert np.isfinite(evaluation[SKETCH.metric])
    assert np.isfinite(evaluation["heldout_kl_sketch_at_temperature"])
    assert COUNTS.metric in evaluation


def test_a_run_keeps_its_tail_when_its_cache_gains_counts(cache, richer, tmp_path):
    config = Train(cache=cache.path, run=tmp_path)
    saved = {"loss.alpha": 1, "loss.temperature": 1, "loss.tail": "sampled"}
    write_json(tmp_path / BINDING, {"rows_id": "", **saved})
    assert with_tail(config, cache=richer)[0].loss.tail == "sampled"
    elsewhere = dataclasses.replace(config, run=tmp_path / "new")
    assert with_tail(elsewhere, cache=richer)[0].loss.tail == "counts"


def test_a_mixture_stacks_the_bases_of_its_caches_and_reads_what_all_have(cache, richer, tmp_path):
    other = with_companions(
        Path(shutil.copytree(cache.path, tmp_path / "other")), seeds=lambda part: 7
    )
    reader = MixtureReader([richer, other], signals=(), targets=("sketch",))
    owners, numbers = np.array([0, 1, 1]), np.array([3, 3, 4])
    batch = reader.read(owners, numbers)
    assert batch["sketch_basis"].tolist() == [0, 1, 1]
    np.testing.assert_array_equal(batch["sketch"][1], other.read([3])["sketch"][0])
    assert "counts" not in batch
    without = MixtureReader([richer, open_cache(cache.path)], signals=())
    assert not {"counts", "sketch"} & without.read(owners, numbers).keys()
    mixed = Train(
        cache=richer.path, run=tmp_path / "run", data=Data(caches=(MixedCache(cache.path),))
    )
    assert with_tail(mixed, cache=richer, others=[cache])[0].loss.tail == "prior"
