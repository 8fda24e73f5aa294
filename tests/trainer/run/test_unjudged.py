"""Training without judging: for a cache of which no row is held out, or because it is asked for."""

import dataclasses

import pytest

from decant.pipelines.capture.job import precompute
from decant.schemas import open_cache
from decant.trainer.config import Data, Keep, Loss, Student, Train
from decant.trainer.run.checkpoint import latest_step
from decant.trainer.run.metrics_log import read_metrics
from decant.trainer.run.train import train
from tests.making.caches import tiny_settings


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Train:
    root = tmp_path_factory.mktemp("unjudged")
    settings = tiny_settings(root, heldout=0.0)
    precompute(settings)
    assert not len(open_cache(settings.output).rows("heldout"))
    return Train(
        cache=settings.output,
        run=root / "run",
        student=Student(source=str(root / "teacher"), layers=1),
        data=Data(batch_rows=2, steps=2),
        loss=Loss(tail="bucket"),
        heldout_rows=0,
    )


def test_a_cache_without_held_out_rows_trains_unjudged(config):
    assert train(config)
    assert latest_step(config.run) == 2
    assert not [line for line in read_metrics(config.run) if "heldout_ce" in line]


def test_without_held_out_rows_the_refusal_says_how_to_train(config, tmp_path):
    with pytest.raises(ValueError, match=r"no held-out rows.*--heldout-rows 0"):
        train(dataclasses.replace(config, run=tmp_path / "run", heldout_rows=8))
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoints_need_judging(config, tmp_path):
    best = dataclasses.replace(config, run=tmp_path / "run", keep=Keep(best=1))
    with pytest.raises(ValueError, match=r"keep.best = 1 .*but heldout_rows = 0"):
        train(best)
