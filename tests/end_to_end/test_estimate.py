"""The estimates of `plan`, compared with the files that the capture writes."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from decant.pipelines.__main__ import main
from decant.pipelines.capture.estimate import estimate
from decant.pipelines.capture.estimate_report import one_line
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Attention, Hidden, Sketch
from decant.schemas import open_cache
from decant.schemas.manifest.manifest import read_manifest
from decant.schemas.signals import SketchSignal
from tests.making.caches import tiny_settings, write_corpus

SIGNALS = {
    "profile": "compact",
    "draws": 2,
    "hidden": Hidden(layers=(1,), dtype="int8"),
    "attention": Attention(layers=(0,)),
}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    write_corpus(root / "corpus", files=12, words=600)
    return root


@pytest.fixture(scope="module")
def config(root):
    return tiny_settings(root, **SIGNALS)


@pytest.fixture(scope="module")
def whole(config):
    return estimate(config, console=QUIET)


def test_the_estimate_is_near_the_files_that_the_capture_writes(config, whole):
    precompute(config)
    cache = open_cache(config.output)
    (part,) = cache.manifest.parts
    assert whole.rows == pytest.approx(len(cache), rel=0.1)
    assert whole.units == pytest.approx(len(part.units), rel=0.1)
    assert whole.tokens == pytest.approx(sum(unit.tokens for unit in part.units), rel=0.1)
    assert whole.scored == pytest.approx(sum(unit.scored for unit in part.units), rel=0.1)
    assert whole.signals.keys() == {"rows", *part.signals}
    for name, cost in whole.signals.items():
        real = sum(unit.files[name].bytes for unit in part.units)
        assert cost.bytes == pytest.approx(real, rel=0.15), name
    files = [path for path in config.output.rglob("*") if path.is_file()]
    assert whole.files == pytest.approx(len(files), rel=0.1)
    assert whole.bytes == pytest.approx(sum(p.stat().st_size for p in files), rel=0.15)


def test_the_default_capture_takes_the_bytes_of_the_estimate(root, tmp_path):
    config = tiny_settings(root, output=tmp_path / "cache", defaults=True)
    planned = estimate(config, console=QUIET)
    (part,) = precompute(config, console=QUIET).parts
    assert planned.signals.keys() == {"rows", "logits", "counts", "sketch"}
    for name, cost in planned.signals.items():
        real = sum(unit.files[name].bytes for unit in part.units)
        assert cost.bytes == pytest.approx(real, rel=0.15), name
    files = [path for path in config.output.rglob("*") if path.is_file()]
    assert planned.files == pytest.approx(len(files), rel=0.1)
    # Its statistics too, of which the sketch's head, as wide as the vocabulary, is the largest.
    assert planned.bytes == pytest.approx(sum(p.stat().st_size for p in files), rel=0.15)
    assert (config.output / part.path / "statistics" / "sketch-head.npy").stat().st_size > 8 * 1024
    (line,) = [line for line in planned.warnings if "sketch" in line]
    assert line.startswith("sketch: 16 numbers a position, half of this teacher's width of 32")


def test_it_says_how_many_numbers_a_small_corpus_gives_a_sketch(root, tmp_path):
    (tmp_path / "corpus").mkdir()
    text = (root / "corpus" / "document-003.txt").read_text()
    (tmp_path / "corpus" / "a.txt").write_text(text[:150])
    config = tiny_settings(tmp_path, heldout=0.0, sketch=Sketch(31))
    planned = estimate(config, console=QUIET)
    (line,) = [line for line in planned.warnings if "sketch" in line]
    precompute(config, console=QUIET)
    signal = read_manifest(config.output).signals["sketch"]
    assert isinstance(signal, SketchSignal)
    assert line.startswith(f"sketch: about {signal.rank} numbers a position in place of 31")


def test_a_sample_of_the_corpus_stands_for_the_rest(config, whole, monkeypatch):
    monkeypatch.setattr(
        "decant.pipelines.capture.estimate._TOKENISED_BYTES", whole.source_bytes // 3
    )
    sampled = estimate(config, console=QUIET)
    assert sampled.tokenised_bytes < 0.6 * sampled.source_bytes
    assert sampled.rows == pytest.approx(whole.rows, rel=0.1)
    assert sampled.units == pytest.approx(whole.units, rel=0.2)
    assert sampled.bytes == pytest.approx(whole.bytes, rel=0.2)


def test_it_says_when_it_will_not_fit_and_leaves_nothing_behind(config, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr("decant.pipelines.capture.estimate.device_bytes", lambda: 1000)
    output = tmp_path / "not yet" / "cache"
    result = estimate(dataclasses.replace(config, output=output), console=QUIET)
    assert [problem.split(":")[0] for problem in result.problems] == [
        f"free on the disk of {output}",
        "each device's memory",
    ]
    assert one_line(result) == f"the capture will not fit: {'; '.join(result.problems)}"
    assert list(tmp_path.iterdir()) == [scratch]
    assert list(scratch.iterdir()) == []


def test_the_command_prints_one_json_document(config, tmp_path, capsys):
    flags = [
        *("--corpus.files", *config.corpus.files),
        "--corpus.sequence-length=64",
        f"--teacher.model={config.teacher.model}",
        "--signals.logits.k=8",
        f"--output={tmp_path / 'never'}",
    ]
    assert main(["plan", "--json", *flags]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["rows"] > 0
    assert document["problems"] == []
    assert document["signals"]["logits"]["bytes"] > 0
    assert not (tmp_path / "never").exists()


def test_wrong_settings_give_the_errors_of_precompute(config):
    hidden = dataclasses.replace(config.signals.hidden, layers=(9,))
    signals = dataclasses.replace(config.signals, hidden=hidden)
    with pytest.raises(ValueError, match="there is no layer 9"):
        estimate(dataclasses.replace(config, signals=signals), console=QUIET)


def test_what_precompute_refuses_of_an_existing_cache_plan_refuses_too(root, tmp_path):
    shutil.copytree(root / "corpus", tmp_path / "corpus")
    config = tiny_settings(tmp_path, hidden=Hidden(layers=(1,)))
    precompute(config)
    logits = dataclasses.replace(config.signals.logits, k=7)
    hidden = Hidden(layers=(1,), dtype="int8")
    (tmp_path / "corpus" / "new.txt").write_text("another document")
    unheld = dataclasses.replace(config.signals, hidden=Hidden())
    changes = {
        "signals.logits.k: there": dataclasses.replace(config.signals, logits=logits),
        "hidden/1": dataclasses.replace(config.signals, hidden=hidden),
        "holds hidden/1, which the config does not ask for": unheld,
    }
    before = sorted(tmp_path.rglob("*"))
    for message, signals in changes.items():
        with pytest.raises(ValueError, match=message):
            estimate(dataclasses.replace(config, signals=signals), console=QUIET)
        assert sorted(tmp_path.rglob("*")) == before
        with pytest.raises(ValueError, match=message):
            precompute(dataclasses.replace(config, signals=signals), console=QUIET)
        before = sorted(tmp_path.rglob("*"))
    document = tmp_path / "corpus" / "document-003.txt"
    document.write_text(document.read_text() + " changed")
    for command in (estimate, precompute):
        with pytest.raises(ValueError, match=r"files: .*document-003.txt has changed"):
            command(config, console=QUIET)


def test_a_sample_without_train_rows_is_measured_on_held_out_rows(root, tmp_path):
    (tmp_path / "corpus").mkdir()
    shutil.copy(root / "corpus" / "document-003.txt", tmp_path / "corpus")
    result = estimate(tiny_settings(tmp_path, heldout=0.9999), console=QUIET)
    assert result.heldout_rows == result.rows > 0
    assert result.measured_rows > 0
    assert result.capture_hours > 0
