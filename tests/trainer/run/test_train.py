"""Whole runs: killed, interrupted and continued; refused if data or settings have changed."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from decant.models import open_checkpoint
from decant.schemas import open_cache
from decant.schemas.disk.atomic import write_json
from decant.trainer.__main__ import main
from decant.trainer.config import Data, Evaluate, Export, Keep, Loss, Optimiser, Student, Train
from decant.trainer.results.evaluate import evaluate
from decant.trainer.results.export import export
from decant.trainer.run.binding import read_run_changes, read_run_settings
from decant.trainer.run.checkpoint import latest_step
from decant.trainer.run.initial_student import initial_student
from decant.trainer.run.metrics_log import MetricsLog, read_metrics
from decant.trainer.run.speed import SPEED
from decant.trainer.run.train import train
from decant.trainer.run.trained_student import load_student
from tests.formulas.events import shown_by_tensorboard
from tests.making.caches import write_teacher
from tests.pickles import pickles_below

STEPS = 120


def settings(cache, run, source, **changes):
    fixed = {
        "student": Student(source=str(source), layers=1),
        "data": Data(batch_rows=2, steps=STEPS),
        "loss": Loss(alpha=0.5, temperature=2.0, tail="bucket", chunk_tokens=64),
        "checkpoint_every": 10,
        "evaluate_every": 25,
        "keep": Keep(last=2, best=1, every=50),
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
        [sys.executable, "-m", "decant.trainer", "train", *flags(config)],
        stdout=subprocess.PIPE,
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


def kill_while_it_saves(config, process):
    """SIGKILL between the first byte of a checkpoint and its name."""
    while process.poll() is None:
        if any(config.run.glob("checkpoints/*tmp*")):
            process.send_signal(signal.SIGSTOP)  # Look again before it can finish.
            if any(config.run.glob("checkpoints/*tmp*")):
                process.kill()
                process.communicate()
                assert any(config.run.glob("checkpoints/*tmp*"))
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.0005)
    raise AssertionError(f"ended before it was caught saving: {process.stderr.read()}")


def test_killed_while_it_saves_terminated_and_without_its_teacher_the_losses_are_the_same(
    undisturbed, cache, root, tmp_path
):
    source = shutil.copytree(root / "teacher", tmp_path / "source")
    config = settings(cache, tmp_path / "run", source)
    process = start(config)
    wait_for_step(config, process, 23)
    kill_while_it_saves(config, process)
    shutil.rmtree(source)
    process = start(config)
    wait_for_step(config, process, latest_step(config.run) + 18)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate()
    assert process.returncode == 0
    assert "To continue, run the same command again: decant train" in printed
    assert latest_step(config.run) == read_metrics(config.run)[-1]["step"]
    train(config)
    expected = without_speed(read_metrics(undisturbed.run))
    # Both sources hold the same weights, so only a different path would differ: nothing does.
    assert without_speed(read_metrics(config.run)) == expected
    assert [line["step"] for line in expected if "loss" in line] == list(range(1, STEPS + 1))
    judged = [line["step"] for line in expected if "heldout_ce" in line]
    assert judged == [0, 25, 50, 75, 100, STEPS]


def test_a_finished_run_started_again_changes_nothing_and_says_so(undisturbed, capsys):
    before = (undisturbed.run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    command = ["train", *flags(undisturbed)]
    assert main(command) == 0
    assert (undisturbed.run / "metrics.jsonl").read_bytes() == before
    printed = capsys.readouterr()
    line, *following = printed.out.splitlines()
    assert line == f"finished: all {STEPS} updates are done and saved in {undisturbed.run}"
    assert following[0] == f"next: decant evaluate {undisturbed.run}"
    assert printed.err == ""
    assert main([*command, "--quiet"]) == 0
    assert capsys.readouterr() == (f"{line}\n", "")
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    lines = read_metrics(undisturbed.run)
    assert result["finished"]
    assert result["step"] == result["steps"] == STEPS
    assert result["heldout"] == lines[-1]
    assert result["last_update"] == next(one for one in lines[::-1] if "loss" in one)


def test_nothing_in_a_run_is_a_pickle(undisturbed):
    assert list((undisturbed.run / "checkpoints").rglob("*"))
    assert pickles_below(undisturbed.run) == []


def test_the_student_learns(undisturbed):
    judged = [line for line in read_metrics(undisturbed.run) if "heldout_ce" in line]
    assert judged[-1]["heldout_ce"] < judged[0]["heldout_ce"] - 0.5
    assert judged[-1]["heldout_kl_bound"] >= 0


@pytest.mark.parametrize("tail", ["sampled", "prior"])
def test_a_student_learns_with_the_tail_by_draws_and_by_the_prior(
    tail, drawn_cache, root, tmp_path
):
    """While T falls from 2 to 1 and α grows."""
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


@pytest.mark.slow  # the losses alone: test_step.py, test_fused_head.py
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


@pytest.mark.slow  # test_processes.py has one that goes on with fewer devices
def test_a_run_continued_on_two_devices_has_the_losses_of_one(undisturbed, tmp_path):
    run = shutil.copytree(undisturbed.run, tmp_path / "run")
    for step in (110, STEPS):
        shutil.rmtree(run / "checkpoints" / str(step))
    config = dataclasses.replace(undisturbed, run=run)
    process = start(config, XLA_FLAGS="--xla_force_host_platform_device_count=2", NPROC="32")
    _, printed = process.communicate()
    assert process.returncode == 0, printed
    got, expected = (
        {line["step"]: line["loss"] for line in read_metrics(path) if "loss" in line}
        for path in (run, undisturbed.run)
    )
    assert got.keys() == expected.keys()
    after = range(101, STEPS + 1)
    np.testing.assert_allclose(*([x[i] for i in after] for x in (got, expected)), rtol=1e-5)
    # Not equal to the bit, because two devices round their sums differently: two were used.
    assert [got[i] for i in after] != [expected[i] for i in after]


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
def test_continuing_with_other_settings_is_refused_by_name(
    undisturbed, cache, root, change, message
):
    with pytest.raises(ValueError, match=message):
        train(settings(cache, undisturbed.run, root / "teacher", **change))


def test_continuing_with_another_cache_is_refused_by_signal(undisturbed, whole_cache, root):
    with pytest.raises(ValueError, match=r"signal_id logits: this run has '\w+', asked for"):
        train(settings(whole_cache, undisturbed.run, root / "teacher"))


def test_settings_that_allow_names_may_change_and_are_recorded(cache, root, tmp_path):
    """With another batch size, training continues at the next row."""
    short = Data(batch_rows=2, steps=4)
    first = settings(cache, tmp_path / "run", root / "teacher", data=short)
    train(first)
    then = dataclasses.replace(
        first,
        data=Data(batch_rows=4, steps=6),
        optimiser=Optimiser(learning_rate=5e-4),
    )
    with pytest.raises(
        ValueError,
        match=r"data.batch_rows: this run has 2, asked for 4\n(.|\n)*steps: this run has 4(.|\n)*"
        r"--allow data.batch_rows data.steps optimiser.learning_rate,",
    ):
        train(then)
    with pytest.raises(ValueError, match=r"optimiser\.learning_rate: this run has 0\.001"):
        train(dataclasses.replace(then, allow=("data",)))
    train(dataclasses.replace(then, allow=("data", "optimiser.learning_rate")))
    lines = [line for line in read_metrics(first.run) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["learning_rate"] < lines[3]["learning_rate"]
    assert lines[-1]["tokens"] > 1.5 * lines[3]["tokens"]
    changes = {c["name"]: (c["after"], c["was"], c["now"]) for c in read_run_changes(first.run)}
    assert changes["optimiser.learning_rate"] == (4, 1e-3, 5e-4)
    assert changes["data.batch_rows"] == (4, 2, 4)
    assert read_run_settings(first.run)["optimiser.learning_rate"] == 5e-4
    train(then)  # the recorded change needs no `allow` again
    with pytest.raises(ValueError, match=r"learning_rate: this run has 0\.0005, asked for 0\.001"):
        train(dataclasses.replace(then, optimiser=Optimiser()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"student": Student(layers=2)},
            r"student.layers: .* \(never allowed: a run cannot change its student",
        ),
        (
            {"optimiser": Optimiser(name="muon")},
            r"optimiser.name: .* \(never allowed: the saved moments",
        ),
        ({"optimiser": Optimiser(freeze=("head",))}, r"optimiser.freeze: .* \(never allowed"),
        ({"allow": ("optimizer",)}, r"no setting is called 'optimizer'; did you mean optimiser"),
    ],
)
def test_settings_that_shape_the_saved_state_can_never_change(
    undisturbed, cache, root, change, message
):
    allow = {"allow": ("student", "optimiser", "data")}
    changed = {"student": undisturbed.student, **allow, **change}
    with pytest.raises(ValueError, match=message):
        train(settings(cache, undisturbed.run, root / "teacher", **changed))


def test_other_code_is_refused_by_name_unless_allowed(undisturbed, tmp_path, monkeypatch):
    config = dataclasses.replace(
        undisturbed, run=shutil.copytree(undisturbed.run, tmp_path / "run")
    )
    assert len(read_run_settings(config.run)["code"]) >= 12
    monkeypatch.setattr("decant.trainer.run.binding.code_version", lambda: "next year's")
    with pytest.raises(
        ValueError, match=r"code: this run has .*, asked for .next year's(.|\n)*code,"
    ):
        train(config)
    train(dataclasses.replace(config, allow=("code",)))
    assert read_run_changes(config.run)[0]["now"] == "next year's"


def test_a_run_of_release_0_4_continues_if_its_code_is_allowed_to_differ(undisturbed, tmp_path):
    """Its `run.json` lacks the code and newer settings, and has `loss.chunk_tokens`."""
    config = dataclasses.replace(
        undisturbed, run=shutil.copytree(undisturbed.run, tmp_path / "run")
    )
    of_0_5 = r"code|optimiser\.(name|schedule|decay_fraction|no_decay|freeze|momentum)"
    bound = read_run_settings(config.run)
    kept = {name: value for name, value in bound.items() if not re.fullmatch(of_0_5, name)}
    assert "loss.chunk_tokens" not in kept
    write_json(config.run / "run.json", {**kept, "loss.chunk_tokens": 256})
    with pytest.raises(ValueError, match=r"--allow code,") as refused:
        train(config)
    different = [line for line in str(refused.value).splitlines() if "this run has" in line]
    assert different == [f"  code: this run has '0.4.0 or older', asked for {bound['code']!r}"]
    train(dataclasses.replace(config, allow=("code",)))


def test_a_checkpoint_of_other_settings_is_refused(undisturbed, tmp_path):
    """Even if `run.json` is gone."""
    config = dataclasses.replace(
        undisturbed, run=shutil.copytree(undisturbed.run, tmp_path / "run")
    )
    (config.run / "run.json").unlink()
    other = dataclasses.replace(config, loss=dataclasses.replace(config.loss, alpha=0.25))
    with pytest.raises(ValueError, match=r"its checkpoint: (.|\n)*loss.alpha: this run has 0.5"):
        train(other)


def test_checkpoints_are_kept_by_age_by_score_and_by_number(undisturbed, cache):
    """The last two, every fiftieth, and the best by held-out KL, which `evaluate` can name."""
    judged = {
        line["step"]: line["heldout_kl"]
        for line in read_metrics(undisturbed.run)
        if "heldout_ce" in line and line["step"]
    }
    best = min(judged, key=judged.get)
    kept = {int(path.name) for path in (undisturbed.run / "checkpoints").iterdir()}
    assert kept == {50, 100, 110, STEPS, best}
    config = Evaluate(run=undisturbed.run, cache=cache.path, heldout_rows=4, batch_rows=2)
    for name, step in (("best", best), ("50", 50)):
        evaluation = evaluate(dataclasses.replace(config, checkpoint=name))
        assert evaluation["heldout_kl"] == pytest.approx(judged[step], rel=1e-5)
    listed = ", ".join(map(str, sorted(kept)))
    with pytest.raises(ValueError, match=f"no checkpoint '60'; .* after updates {listed}"):
        evaluate(dataclasses.replace(config, checkpoint="60"))


@pytest.mark.slow  # the run killed above goes on without its teacher too
def test_two_students_learn_from_a_copied_cache_without_the_teacher(cache, root, tmp_path):
    """Students of two sizes with two losses; the cache has moved and its teacher is gone."""
    moved = shutil.copytree(cache.path, tmp_path / "moved")
    hidden = (root / "teacher").rename(tmp_path / "away")
    try:
        for name, student, loss in (
            ("narrow", Student(init="scratch", layers=1, hidden_size=16), Loss(tail="bucket")),
            ("deep", Student(init="scratch", layers=3), Loss(alpha=0.2, tail="prior")),
        ):
            config = settings(
                open_cache(moved),
                tmp_path / name,
                root / "teacher",
                student=student,
                loss=loss,
                data=Data(batch_rows=2, steps=12),
            )
            train(config)
            judged = [line for line in read_metrics(config.run) if "heldout_ce" in line]
            assert judged[-1]["heldout_ce"] < judged[0]["heldout_ce"]
    finally:
        hidden.rename(root / "teacher")


def test_frequencies_of_saving_and_logging_may_change(undisturbed, cache, root):
    train(settings(cache, undisturbed.run, root / "teacher", checkpoint_every=7, log_every=5))


def test_a_run_with_non_finite_losses_stops_and_logs_their_rows(cache, tmp_path):
    source = write_teacher(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38  # finite, but the logits overflow
    save_file(weights, source / "model.safetensors")
    config = settings(cache, tmp_path / "run", source, max_bad_steps=3)
    with pytest.raises(FloatingPointError, match=r"3 updates in a row .* at step 3 with rows"):
        train(config)
    lines = [line for line in read_metrics(config.run) if "loss" in line]
    assert [line["skipped"] for line in lines] == [1, 2, 3]
    assert all(len(line["skipped_rows"]) == 2 for line in lines)
    assert lines[0]["loss"] is None


def test_a_student_with_non_finite_weights_is_neither_trained_nor_exported(cache, tmp_path):
    source = write_teacher(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][3] = np.nan
    save_file(weights, source / "model.safetensors")
    config = settings(cache, tmp_path / "run", source)
    with pytest.raises(FloatingPointError, match=r"initial: \['final_norm'\] .* not finite"):
        train(config)
    with pytest.raises(FloatingPointError, match=r"initial: \['final_norm'\] .* not finite"):
        export(Export(run=config.run, output=tmp_path / "exported"))
    assert not (tmp_path / "exported").exists()


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(cache, root, tmp_path, monkeypatch):
    config = settings(
        cache,
        tmp_path / "run",
        root / "teacher",
        data=Data(batch_rows=2, steps=30),
        optimiser=Optimiser(schedule="constant", warmup_steps=0),
        checkpoint_every=1,
        max_bad_steps=3,
        keep=Keep(),
    )
    stop_at(3, monkeypatch)
    assert not train(config).finished
    good = latest_step(config.run)
    before = load_student(config.run, dtype="float32")[1]
    # Weights grow by a factor of 10⁶ an update: finite for a while, but their logits are not.
    wild = dataclasses.replace(config.optimiser, learning_rate=1e3, weight_decay=1e3)
    again = dataclasses.replace(config, optimiser=wild, allow=("optimiser",), keep=Keep(last=99))
    message = r"3 updates in a row .* is saved in .* after update (\d+)\. .*--allow optimiser.learn"
    with pytest.raises(FloatingPointError, match=message) as stopped:
        train(again)
    assert int(re.search(message, str(stopped.value))[1]) == latest_step(config.run) < 30
    lines = [line for line in read_metrics(config.run) if line["step"] <= latest_step(config.run)]
    assert lines[-1]["loss"] is not None
    after = load_student(config.run, dtype="float32", checkpoint=str(good))[1]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, after)))


def stop_at(step, monkeypatch):
    """SIGTERM once the run has logged an update."""
    log = MetricsLog.log_update

    def log_and_stop(self, metrics):
        log(self, metrics)
        if metrics["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "log_update", log_and_stop)


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


def test_a_link_in_the_place_of_the_first_student_is_not_followed(cache, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.initial.partial").symlink_to(tmp_path / "home")
    config = Student(init="scratch", hidden_size=16)
    initial_student(config, cache=cache, run=tmp_path / "run", dtype="float32", seed=0)
    assert list((tmp_path / "home").iterdir()) == []


def test_a_student_from_scratch_takes_sizes_from_config_and_flags(cache, root, tmp_path):
    config = Student(
        init="scratch", config=root / "teacher" / "config.json", hidden_size=16, num_kv_heads=4
    )
    made = initial_student(config, cache=cache, run=tmp_path, dtype="float32", seed=0).config
    assert (made.hidden_size, made.num_kv_heads, made.head_dim, made.num_layers) == (16, 4, 4, 2)
    assert open_checkpoint(tmp_path / "initial").config == made


def test_evaluate_repeats_the_last_held_out_metrics(undisturbed, cache):
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


def test_a_users_mistakes_are_one_message_without_a_traceback(tmp_path, capsys):
    assert main(["train", f"--cache={tmp_path / 'nothing'}"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert "no such cache directory" in printed
    config = tmp_path / "config.toml"
    config.write_text("[loss]\ntemprature = 2\n")
    assert main(["train", str(config)]) == 1
    assert "did you mean loss.temperature?" in capsys.readouterr().err
    assert main(["train", "--loss.temperature=0.5"]) == 1
    assert "loss.temperature is 0.5" in capsys.readouterr().err


def test_a_runs_events_are_its_metrics(undisturbed):
    shown = shown_by_tensorboard(undisturbed.run)
    lines = read_metrics(undisturbed.run)
    for tag, name in (("train/loss", "loss"), ("heldout/ce", "heldout_ce")):
        expected = [(line["step"], np.float32(line[name])) for line in lines if name in line]
        assert shown[tag] == expected
    assert len(shown["train/step_seconds"]) == STEPS
