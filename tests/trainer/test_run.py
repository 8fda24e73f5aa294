"""A whole run: killed, interrupted and gone on with; refused when it is not the same run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models import open_checkpoint
from schemas import open_cache
from tests.make_cache import write_teacher
from tests.pickles import pickles_below
from tests.trainer.events import shown_by_tensorboard
from trainer.__main__ import main
from trainer.config import Data, Evaluate, Export, Loss, Plot, Student, Train
from trainer.export import export
from trainer.loop import evaluate, train
from trainer.metrics import read_metrics
from trainer.plot import plot
from trainer.speed import SPEED
from trainer.student import initial_student

STEPS = 120


def settings(cache, run, source, **changes):
    fixed = {
        "student": Student(source=str(source), layers=1),
        "data": Data(batch_rows=2, steps=STEPS),
        "loss": Loss(alpha=0.5, temperature=2.0, tail="bucket", chunk_tokens=64),
        "checkpoint_every": 10,
        "evaluate_every": 25,
        "heldout_rows": 4,
    }
    return Train(cache=cache.path, run=run, **{**fixed, **changes})


def flags(config):
    return [
        f"--cache={config.cache}",
        f"--run={config.run}",
        f"--student.source={config.student.source}",
        "--student.layers=1",
        "--data.batch-rows=2",
        f"--data.steps={config.data.steps}",
        "--loss.alpha=0.5",
        "--loss.temperature=2",
        "--loss.tail=bucket",
        "--loss.chunk-tokens=64",
        "--checkpoint-every=10",
        "--evaluate-every=25",
        "--heldout-rows=4",
    ]


def start(config, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", "train", *flags(config)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def wait_for_step(config, process, step):
    """Return as soon as the run has logged `step`."""
    path = config.run / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(f"ended before step {step}: {process.stderr.read()}")


def without_speed(lines):
    return [{k: v for k, v in line.items() if k not in SPEED} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(cache, root, tmp_path_factory):
    config = settings(cache, tmp_path_factory.mktemp("runs") / "undisturbed", root / "teacher")
    train(config)
    return config


def test_killed_interrupted_and_without_its_teacher_the_losses_are_the_same(
    undisturbed, cache, root, tmp_path
):
    source = shutil.copytree(root / "teacher", tmp_path / "source")
    config = settings(cache, tmp_path / "run", source)
    process = start(config)
    wait_for_step(config, process, 33)
    process.kill()
    process.communicate()
    shutil.rmtree(source)
    process = start(config)
    wait_for_step(config, process, 58)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate()
    assert process.returncode == 0
    assert "To go on, run the same command again" in printed
    train(config)
    expected = without_speed(read_metrics(undisturbed.run))
    # Both sources hold the same weights, so only a different path would differ: nothing does.
    assert without_speed(read_metrics(config.run)) == expected
    assert [line["step"] for line in expected if "loss" in line] == list(range(1, STEPS + 1))
    judged = [line["step"] for line in expected if "heldout_ce" in line]
    assert judged == [0, 25, 50, 75, 100, STEPS]


def test_a_finished_run_started_again_changes_nothing(undisturbed):
    before = (undisturbed.run / "metrics.jsonl").read_bytes()
    train(undisturbed)
    assert (undisturbed.run / "metrics.jsonl").read_bytes() == before


def test_nothing_in_a_run_is_a_pickle(undisturbed):
    assert list((undisturbed.run / "checkpoints").rglob("*"))
    assert pickles_below(undisturbed.run) == []


def test_the_student_learns(undisturbed):
    judged = [line for line in read_metrics(undisturbed.run) if "heldout_ce" in line]
    assert judged[-1]["heldout_ce"] < judged[0]["heldout_ce"] - 0.5
    assert judged[-1]["heldout_kl_bound"] >= 0


@pytest.mark.parametrize("tail", ["sampled", "prior"])
def test_a_student_learns_from_what_a_cache_knows_of_the_tail(tail, drawn_cache, root, tmp_path):
    """While T falls from 2 to 1 and the teacher's share grows, on one cache."""
    loss = Loss(
        tail=tail, temperature=2.0, temperature_end=1.0, alpha=0.5, alpha_end=0.9, chunk_tokens=64
    )
    data = Data(batch_rows=2, steps=60)
    student = Student(init="scratch", layers=1)
    config = settings(
        drawn_cache, tmp_path / "run", root / "teacher", loss=loss, data=data, student=student
    )
    train(config)
    lines = read_metrics(config.run)
    judged = [line for line in lines if "heldout_ce" in line]
    assert judged[-1]["heldout_kl_bound"] < 0.9 * judged[0]["heldout_kl_bound"]
    updates = [line for line in lines if "loss" in line]
    assert [updates[0][name] for name in ("temperature", "alpha")] == [2.0, 0.5]
    np.testing.assert_allclose([updates[-1][n] for n in ("temperature", "alpha")], [1.0, 0.9])


def test_with_every_token_stored_the_prior_changes_nothing(whole_cache, root, tmp_path):
    data = Data(batch_rows=2, steps=3)
    losses = []
    for tail in ("prior", "bucket"):
        config = settings(
            whole_cache, tmp_path / tail, root / "teacher", loss=Loss(tail=tail), data=data
        )
        train(config)
        losses.append([line["loss"] for line in read_metrics(config.run) if "loss" in line])
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_two_devices_give_the_losses_of_one(undisturbed, cache, root, tmp_path):
    config = settings(cache, tmp_path / "run", root / "teacher")
    process = start(config, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    wait_for_step(config, process, 12)
    process.kill()
    process.communicate()
    pairs = zip(read_metrics(config.run), read_metrics(undisturbed.run), strict=False)
    compared = 0
    for got, expected in pairs:
        if "loss" in got:
            np.testing.assert_allclose(got["loss"], expected["loss"], rtol=1e-5)
            compared += 1
    assert compared >= 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"loss": Loss(alpha=0.25, tail="bucket")},
            r"loss.alpha: this run has 0.5, asked for 0.25",
        ),
        ({"data": Data(seed=3, batch_rows=2, steps=STEPS)}, r"data.seed: this run has 0"),
        ({"student": Student(layers=2)}, r"student.layers: this run has 1, asked for 2"),
    ],
)
def test_going_on_with_other_settings_is_refused_by_name(undisturbed, cache, root, change, message):
    with pytest.raises(ValueError, match=message):
        train(settings(cache, undisturbed.run, root / "teacher", **change))


def test_going_on_with_another_cache_is_refused_by_signal(undisturbed, whole_cache, root):
    with pytest.raises(ValueError, match=r"signal_id logits: this run has '\w+', asked for"):
        train(settings(whole_cache, undisturbed.run, root / "teacher"))


def test_how_often_it_saves_and_judges_may_change(undisturbed, cache, root):
    train(settings(cache, undisturbed.run, root / "teacher", checkpoint_every=7, log_every=5))


def test_a_run_gone_bad_stops_and_saves_its_rows(cache, tmp_path):
    source = write_teacher(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][:] = np.nan
    save_file(weights, source / "model.safetensors")
    config = settings(cache, tmp_path / "run", source, max_bad_steps=3)
    with pytest.raises(FloatingPointError, match=r"3 updates in a row .* at step 3 with rows"):
        train(config)
    lines = [line for line in read_metrics(config.run) if "loss" in line]
    assert [line["skipped"] for line in lines] == [1, 2, 3]
    assert all(len(line["skipped_rows"]) == 2 for line in lines)
    assert lines[0]["loss"] is None


def test_a_damaged_record_stops_the_run_with_its_name(cache, root, tmp_path):
    broken = shutil.copytree(cache.path, tmp_path / "broken")
    for path in broken.glob("parts/0000/logits/*"):
        data = bytearray(path.read_bytes())
        data[64:] = bytes(len(data) - 64)
        path.write_bytes(data)
    config = settings(open_cache(broken), tmp_path / "run", root / "teacher")
    with pytest.raises(ValueError, match="array_record"):
        train(config)


def test_a_student_with_fewer_tokens_is_refused_with_both_numbers(cache, tmp_path):
    source = write_teacher(tmp_path / "small", vocabulary=400)
    with pytest.raises(ValueError, match=r"vocabulary of 512 tokens, but .* has only 400"):
        train(settings(cache, tmp_path / "run", source))


def test_a_student_with_another_tokenizer_is_refused(cache, root, tmp_path):
    source = shutil.copytree(root / "teacher", tmp_path / "other")
    path = source / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["model"]["merges"] = definition["model"]["merges"][::-1]
    path.write_text(json.dumps(definition))
    with pytest.raises(ValueError, match="token ids would not line up"):
        train(settings(cache, tmp_path / "run", source))


def test_a_student_from_scratch_takes_sizes_from_config_and_flags(cache, root, tmp_path):
    config = Student(
        init="scratch", config=root / "teacher" / "config.json", hidden_size=16, num_kv_heads=4
    )
    made = initial_student(config, cache=cache, run=tmp_path, dtype="float32", seed=0).config
    assert (made.hidden_size, made.num_kv_heads, made.head_dim, made.num_layers) == (16, 4, 4, 2)
    assert open_checkpoint(tmp_path / "initial").config == made


def test_evaluate_repeats_the_last_judgement(undisturbed, cache):
    got = evaluate(Evaluate(run=undisturbed.run, cache=cache.path, heldout_rows=4, batch_rows=2))
    last = [line for line in read_metrics(undisturbed.run) if "heldout_ce" in line][-1]
    assert got["heldout_ce"] == pytest.approx(last["heldout_ce"], rel=1e-6)


def test_the_exported_student_starts_the_next_run(undisturbed, cache, tmp_path):
    out = export(Export(run=undisturbed.run, cache=cache.path, output=tmp_path / "exported"))
    student = Student(init="checkpoint", source=str(out))
    config = settings(
        cache, tmp_path / "next", out, student=student, data=Data(batch_rows=2, steps=1)
    )
    train(config)
    first = read_metrics(config.run)[0]
    last = [line for line in read_metrics(undisturbed.run) if "heldout_ce" in line][-1]
    assert first["heldout_ce"] == pytest.approx(last["heldout_ce"], rel=1e-6)


def test_the_picture_shows_several_runs(undisturbed, tmp_path):
    path = plot(Plot(runs=(undisturbed.run, undisturbed.run), output=tmp_path / "a" / "b.png"))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_errors_of_the_user_are_one_message_without_a_traceback(tmp_path, capsys):
    assert main(["train", f"--cache={tmp_path / 'nothing'}"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert "no such cache directory" in printed
    config = tmp_path / "config.toml"
    config.write_text("[loss]\ntemprature = 2\n")
    assert main(["train", str(config)]) == 1
    assert "did you mean loss.temperature?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--loss.temperature=0.5"])
    assert "loss.temperature is 0.5" in capsys.readouterr().err


def test_an_unknown_command_lists_the_known_ones(capsys):
    assert main(["trian"]) == 2
    assert "evaluate" in capsys.readouterr().err


def test_a_runs_events_are_its_metrics(undisturbed):
    shown = shown_by_tensorboard(undisturbed.run)
    lines = read_metrics(undisturbed.run)
    for tag, name in (("train/loss", "loss"), ("heldout/ce", "heldout_ce")):
        expected = [(line["step"], np.float32(line[name])) for line in lines if name in line]
        assert shown[tag] == expected
    assert len(shown["train/step_seconds"]) == STEPS
