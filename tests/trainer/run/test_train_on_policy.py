"""Training on rollouts: what is learned from, logged, judged and refused."""

import dataclasses

import numpy as np
import pytest

from decant.models import open_checkpoint
from decant.pipelines.capture.job import precompute
from decant.schemas import Cache, open_cache
from decant.trainer.__main__ import main
from decant.trainer.config import Data, HiddenLoss, Loss, MixedCache, Student, Train
from decant.trainer.run.metrics_log import read_metrics
from decant.trainer.run.rollout_writers import about_writers
from decant.trainer.run.train import train
from decant.trainer.run.trained_student import student_digest
from tests.making.caches import tiny_cache
from tests.making.rollouts import rollout_settings


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("rollouts")


@pytest.fixture(scope="module")
def rollouts(root) -> Cache:
    config = rollout_settings(root, heldout=0.3, defaults=True)
    precompute(config)
    return open_cache(config.output)


def settings(rollouts, run, **loss) -> Train:
    return Train(
        cache=rollouts.path,
        run=run,
        student=Student(init="checkpoint", source=str(rollouts.path.parent / "teacher")),
        data=Data(batch_rows=2, steps=3),
        loss=Loss(**{"divergence": "on_policy", "chunk_tokens": 64, **loss}),
        heldout_rows=2,
        evaluate_every=3,
        log_every=1,
    )


def updates(run):
    return [line for line in read_metrics(run) if "loss" in line]


def test_a_run_logs_advantage_ratio_and_clipped_share_and_is_judged(rollouts, tmp_path, capsys):
    train(settings(rollouts, tmp_path / "run"))
    first, *_, last = updates(tmp_path / "run")
    assert {"advantage", "ratio", "clipped", "ce_loss"} <= first.keys()
    assert not {"kl_loss", "agreement"} & first.keys()
    # The student is the teacher, so the teacher has no advantage. The writer is another.
    assert abs(first["advantage"]) < 2e-2
    assert first["alpha"] == 1
    assert 0 < first["clipped"] < 1
    assert last["step"] == 3
    judged = [line for line in read_metrics(tmp_path / "run") if "heldout_kl" in line]
    assert judged[0]["heldout_kl"] < 0.05
    assert "36 of 36 rollouts were not written by this run's first student but by" in (
        "".join(capsys.readouterr()).replace("\n", " ")
    )


@pytest.mark.slow
def test_microbatches_change_nothing_but_rounding(rollouts, tmp_path):
    whole = settings(rollouts, tmp_path / "whole", alpha=0.8, anchor=0.1)
    cut = dataclasses.replace(
        whole, run=tmp_path / "cut", data=dataclasses.replace(whole.data, microbatches=2)
    )
    lines = []
    for config in (whole, cut):
        train(config)
        lines.append(updates(config.run))
    for one, two in zip(*lines, strict=True):
        for name in ("loss", "advantage", "ratio", "clipped", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6)


def test_the_variants_with_all_tokens_learn_from_the_same_cache(rollouts, tmp_path, capsys):
    for kind in ("reverse_kl", "forward_kl"):
        train(settings(rollouts, tmp_path / kind, divergence=kind))
        assert updates(tmp_path / kind)[0]["kl_loss"] < 0.05
    assert "loss.tail is sketch, for T = 1 with reverse_kl" in (
        "".join(capsys.readouterr()).replace("\n", " ")
    )


def test_rows_of_a_plain_cache_are_learned_from_their_labels(rollouts, tmp_path):
    plain = tiny_cache(rollouts.path.parent / "plain")
    config = settings(rollouts, tmp_path / "run", hidden=())
    mixed = MixedCache(path=plain.path, weight=1.0)
    data = dataclasses.replace(config.data, caches=(mixed,), batch_rows=4)
    train(dataclasses.replace(config, data=data))
    assert all(np.isfinite(line["loss"]) for line in updates(tmp_path / "run"))
    swapped = dataclasses.replace(config, cache=plain.path, run=tmp_path / "other")
    with pytest.raises(ValueError, match=r"plain.*of the model that wrote them.*decant generate"):
        train(swapped)


def test_the_command_line_refuses_a_cache_without_rollouts(rollouts, tmp_path, capsys):
    plain = tiny_cache(rollouts.path.parent / "plain")
    flags = ("train", "--cache", str(plain.path), "--run", str(tmp_path / "run"))
    assert main([*flags, "--loss.divergence", "on_policy"]) == 1
    told = capsys.readouterr().err
    assert "decant generate" in told
    assert "Traceback" not in told


def test_the_log_names_the_writer_by_what_the_student_computes(rollouts):
    model = open_checkpoint(str(rollouts.path.parent / "teacher")).load()
    loss = Loss(divergence="on_policy", hidden=(HiddenLoss(),))

    def written(*names):
        parts = [dataclasses.replace(p, writers=dict(names)) for p in rollouts.manifest.parts]
        manifest = dataclasses.replace(rollouts.manifest, parts=tuple(parts))
        return Cache(rollouts.path, manifest)

    own = student_digest(model)
    line = about_writers([written((own, 36))], loss=loss, first=model)
    assert line == "all 36 rollouts were written by this run's first student"
    line = about_writers([written((own, 30), ("f" * 64, 4), ("", 2))], loss=loss, first=model)
    assert line is not None
    assert "6 of 36 rollouts were not written" in line
    assert "ffffffffffff (4), no name (2)" in line
    assert about_writers([written((own, 36))], loss=Loss(), first=model) is None
