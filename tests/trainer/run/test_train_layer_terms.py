"""Whole runs with hidden states and attention maps: gone on with, judged, exported, refused."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from decant.models import open_checkpoint
from decant.pipelines.config import Attention, Hidden
from decant.pipelines.upkeep.remove import remove_signals
from decant.schemas import open_cache
from decant.trainer.__main__ import main
from decant.trainer.config import (
    AttentionLoss,
    Data,
    Evaluate,
    Export,
    HiddenLoss,
    Loss,
    Student,
    Train,
)
from decant.trainer.data.batches import Batches
from decant.trainer.results.evaluate import evaluate
from decant.trainer.results.export import export
from decant.trainer.results.run_summary import read_run_summaries
from decant.trainer.run.binding import read_run_settings
from decant.trainer.run.metrics_log import read_metrics
from decant.trainer.run.speed import SPEED
from decant.trainer.run.train import train
from tests.making.caches import tiny_cache

STEPS = 9
TERMS = Loss(
    alpha=0.5,
    tail="bucket",
    chunk_tokens=64,
    hidden=(HiddenLoss(weight=0.1, projection=True),),
    attention=(AttentionLoss(weight=0.1, weight_end=1.0, kind="kl"),),
)
LOGITS_ONLY = Loss(tail="bucket", chunk_tokens=64)


def settings(cache, run, source, **changes):
    fixed = {
        "student": Student(source=str(source), layers=1),
        "data": Data(batch_rows=2, steps=STEPS),
        "loss": TERMS,
        "checkpoint_every": 4,
        "evaluate_every": 100,
        "heldout_rows": 4,
    }
    return Train(cache=cache.path, run=run, **{**fixed, **changes})


def losses(run):
    lines = [line for line in read_metrics(run) if "loss" in line]
    return [{k: v for k, v in line.items() if k not in SPEED} for line in lines]


def train_until(config, step, monkeypatch):
    """Interrupt the run at the batch after `step`, as a kill would."""
    taken, batch = [], Batches.next

    def next_batch(self):
        taken.append(1)
        if len(taken) > step:
            raise KeyboardInterrupt
        return batch(self)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "next", next_batch)
        with pytest.raises(KeyboardInterrupt):
            train(config)


@pytest.fixture(scope="module")
def undisturbed(layered_cache, layered_root, tmp_path_factory):
    config = settings(
        layered_cache, tmp_path_factory.mktemp("runs") / "undisturbed", layered_root / "teacher"
    )
    train(config)
    return config


def test_a_run_s_metrics_have_its_terms(undisturbed):
    first, *_, last = losses(undisturbed.run)
    assert {"hidden_state_loss", "attention_loss", "attention[0].weight"} <= first.keys()
    np.testing.assert_allclose(
        [first["attention[0].weight"], last["attention[0].weight"]], [0.1, 1.0]
    )
    assert last["hidden_state_loss"] < first["hidden_state_loss"]
    (run,) = read_run_summaries([undisturbed.run])
    assert run.kind == "α = 0.5, T = 1, bucket, hidden states, attention maps"


def test_interrupted_and_without_its_teacher_a_run_continues_to_the_same_losses(
    undisturbed, layered_cache, layered_root, tmp_path, monkeypatch
):
    """Its projections and default pairs are saved, both before and after its first checkpoint."""
    source = shutil.copytree(layered_root / "teacher", tmp_path / "source")
    config = settings(layered_cache, tmp_path / "run", source)
    train_until(config, 2, monkeypatch)
    first = load_file(config.run / "projections.safetensors")
    shutil.rmtree(source)
    train_until(config, 6, monkeypatch)
    train(config)
    assert losses(config.run) == losses(undisturbed.run)
    assert [line["step"] for line in losses(config.run)] == list(range(1, STEPS + 1))
    again = load_file(config.run / "projections.safetensors")
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert first["hidden-0-0"].shape == (32, 32)


def test_a_run_is_evaluated_and_exported_without_its_projections(
    undisturbed, layered_cache, tmp_path
):
    last = [line for line in read_metrics(undisturbed.run) if "heldout_ce" in line][-1]
    got = evaluate(
        Evaluate(run=undisturbed.run, cache=layered_cache.path, heldout_rows=4, batch_rows=2)
    )
    assert got["heldout_ce"] == pytest.approx(last["heldout_ce"], rel=1e-6)
    out = export(
        Export(run=undisturbed.run, cache=layered_cache.path, output=tmp_path / "exported")
    )
    assert not [name for name in load_file(out / "model.safetensors") if "projection" in name]
    student, first = open_checkpoint(out), open_checkpoint(undisturbed.run / "initial")
    assert student.config == first.config
    assert set(student.files.shapes) == set(first.files.shapes)


def test_a_run_is_bound_to_the_signals_that_it_reads(undisturbed, layered_cache):
    bound = read_run_settings(undisturbed.run)
    read = {name: value for name, value in bound.items() if name.startswith("signal_id")}
    held = layered_cache.manifest.signals
    names = ("logits", "hidden/2", "attention/0", "attention/1")
    assert read == {f"signal_id {name}": held[name].signal_id for name in names}
    # The student's only block is compared with the maps of both teacher blocks.
    assert bound["loss.attention[0].student_layers"] == [0, 0]
    assert bound["loss.attention[0].teacher_layers"] == [0, 1]


def test_added_signals_do_not_stop_a_run_and_a_removed_one_is_named(
    layered_root, tmp_path, monkeypatch
):
    """The default "all stored maps" keeps its meaning from the run's beginning."""
    output, one, every = tmp_path / "cache", Attention(layers=(1,)), Attention(layers="all")
    small = tiny_cache(layered_root, output=output, hidden=Hidden(layers=(2,)), attention=one)
    config = settings(small, tmp_path / "run", layered_root / "teacher")
    train_until(config, 5, monkeypatch)
    bound = read_run_settings(config.run)
    larger = tiny_cache(layered_root, output=output, hidden=Hidden(layers=(1, 2)), attention=every)
    assert {"hidden/1", "attention/0"} <= larger.manifest.signals.keys()
    train_until(config, 2, monkeypatch)
    assert read_run_settings(config.run) == bound
    remove_signals(larger.path, ["hidden/2"])
    with pytest.raises(ValueError, match=r"no hidden/2 in this cache, which holds .*hidden/1, "):
        train(config)


def test_logits_only_runs_read_no_array_and_others_name_the_missing_one(
    layered_cache, layered_root, tmp_path
):
    bare = shutil.copytree(layered_cache.path, tmp_path / "bare")
    shutil.rmtree(bare / "parts" / "0000" / "hidden")
    shutil.rmtree(bare / "parts" / "0000" / "attention")
    config = settings(
        open_cache(bare),
        tmp_path / "run",
        layered_root / "teacher",
        loss=LOGITS_ONLY,
        data=Data(batch_rows=2, steps=2),
    )
    train(config)
    assert len(losses(config.run)) == 2
    assert not (config.run / "projections.safetensors").exists()
    with pytest.raises(ValueError, match=r"hidden/2"):
        train(settings(open_cache(bare), tmp_path / "other", layered_root / "teacher"))


def test_hidden_states_alone_teach_a_student(layered_cache, layered_root, tmp_path):
    """The term's own loss falls with α = 0."""
    loss = Loss(
        alpha=0.0, tail="bucket", chunk_tokens=64, hidden=(HiddenLoss(weight=5.0, kind="cosine"),)
    )
    student = Student(init="scratch", layers=1)
    config = settings(
        layered_cache,
        tmp_path / "run",
        layered_root / "teacher",
        loss=loss,
        student=student,
        data=Data(batch_rows=2, steps=30),
    )
    train(config)
    first, *_, last = losses(config.run)
    assert last["hidden_state_loss"] < 0.9 * first["hidden_state_loss"]
    np.testing.assert_allclose(
        first["loss"], first["ce_loss"] + 5 * first["hidden_state_loss"], rtol=1e-6
    )


@pytest.mark.slow
def test_the_classic_online_step_is_a_config(layered_cache, layered_root, tmp_path):
    """T = 4, α = 0.9, microbatches, states and maps; each part of the loss is in the metrics."""
    config = tmp_path / "online.toml"
    config.write_text(f"""
cache = "{layered_cache.path}"
run = "{tmp_path / "run"}"
[student]
source = "{layered_root / "teacher"}"
layers = 2
[loss]
temperature = 4.0
alpha = 0.9
tail = "bucket"
[[loss.hidden]]
weight = 0.5
scale = "sum"
[[loss.attention]]
weight = 0.25
scale = "pairs"
normalize = false
[data]
batch_rows = 4
microbatches = 2
steps = 2
""")
    assert main(["train", str(config), "--heldout-rows=2"]) == 0
    for line in losses(tmp_path / "run"):
        expected = (
            0.9 * 4**2 * line["kl_loss"]
            + (1 - 0.9) * line["ce_loss"]
            + 0.5 * line["hidden_state_loss"]
            + 0.25 * line["attention_loss"]
        )
        np.testing.assert_allclose(line["loss"], expected, rtol=1e-5)
        assert {"learning_rate", "grad_norm", "tokens"} <= line.keys()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            Loss(tail="bucket", hidden=(HiddenLoss(student_layers=(2,), teacher_layers=(2,)),)),
            r"hidden\[0\].student_layers: layer 2 does not exist; the student has layers 0 to 1",
        ),
        (
            Loss(tail="bucket", hidden=(HiddenLoss(student_layers=(1,), teacher_layers=(9,)),)),
            r"hidden\[0\].teacher_layers: layer 9 does not exist; the teacher has layers 0 to 2",
        ),
    ],
)
def test_layers_that_do_not_exist_are_refused_before_anything_is_written(
    loss, message, layered_cache, layered_root, tmp_path
):
    with pytest.raises(ValueError, match=message):
        train(settings(layered_cache, tmp_path / "run", layered_root / "teacher", loss=loss))
    assert not (tmp_path / "run").exists()
