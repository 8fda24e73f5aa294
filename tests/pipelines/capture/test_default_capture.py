"""The record of a capture with default settings, and what is kept where settings are unset."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Logits, Precompute, Sketch
from decant.schemas import Cache, open_cache
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.disk.layout import COUNTS, LOGITS, MANIFEST, SKETCH, part_layout
from decant.schemas.signals import CountsSignal, SketchSignal
from tests.making.caches import tiny_cache, tiny_settings, write_corpus, write_teacher

WIDTH = 32
"""Of the tiny teacher; half of it is the rank."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("default")
    write_corpus(root / "corpus", files=4)
    return root


@pytest.fixture(scope="module")
def cache(root) -> Cache:
    return tiny_cache(root, defaults=True)


@pytest.fixture(scope="module")
def head_only(root) -> Path:
    return tiny_cache(root, output=root / "head-only", draws=4, profile="compact").path


def without_counts_and_sketch(root: Path, output: Path, **logits: Any) -> Precompute:
    """Settings with the old record's `k` and `draws`, which say nothing of counts and sketch."""
    return tiny_settings(root, output=output, defaults=True, draws=4, **logits)


def sketch_of(path: Path) -> SketchSignal:
    signal = open_cache(path).manifest.signals[SKETCH]
    assert isinstance(signal, SketchSignal)
    return signal


def test_the_default_is_a_small_head_counts_and_a_sketch(cache):
    logits, signals = cache.manifest.logits, cache.manifest.signals
    assert (logits.k, logits.draws, logits.profile) == (8, 0, "compact")
    assert isinstance(signals[COUNTS], CountsSignal)
    assert signals[COUNTS].draws == 100
    read = cache.read(cache.rows())
    scored = read["loss_mask"]
    assert (read["counts"][scored].sum(1) == 100).all()
    assert read["sketch"].shape[2] == WIDTH // 2
    assert np.isfinite(read["label_logprobs"][scored]).all()


@pytest.mark.parametrize(("width", "rank"), [(4096, 256), (576, 256), (256, 128), (64, 32), (1, 1)])
def test_an_unset_rank_is_256_or_half_of_a_narrow_teachers_width(width, rank):
    assert Logits().decided(width=width).sketch == Sketch(rank)
    assert Logits(sketch=Sketch(8)).decided(width=width).sketch.rank == 8
    assert Logits(k=0).decided(width=width).sketch.rank == 0
    stepped = Logits(sketch=Sketch(step=0.5)).decided(width=width).sketch
    assert stepped == Sketch(rank, step=0.5)


def test_the_same_rank_asked_for_gives_the_same_bytes(root, cache):
    asked = tiny_cache(root, output=root / "asked", defaults=True, sketch=Sketch(WIDTH // 2))
    assert asked.manifest.cache_id == cache.manifest.cache_id


def test_a_capture_that_has_only_begun_goes_on_to_the_same_bytes(root, cache, tmp_path):
    settings = tiny_settings(root, output=tmp_path / "cache", defaults=True)
    request = part_layout(settings.output, 0).request
    request.parent.mkdir(parents=True)
    shutil.copy(part_layout(cache.path, 0).request, request)
    assert precompute(settings).cache_id == cache.manifest.cache_id


def test_a_narrow_teachers_rank_is_told_before_the_teacher_runs(root, tmp_path, capsys):
    settings = tiny_settings(root, output=tmp_path / "cache", defaults=True)
    precompute(settings)
    told = " ".join(capsys.readouterr().err.split())
    line = "sketch: 16 numbers a position, half of this teacher's width of 32"
    assert told.index(line) < told.index("calibrate:")
    precompute(settings)
    assert line not in capsys.readouterr().err


@pytest.mark.parametrize(("words", "rank"), [(1, 1), (40, 5)])
def test_a_sample_too_small_gives_fewer_numbers_and_says_so(tmp_path, capsys, words, rank):
    write_corpus(tmp_path / "corpus", files=1, words=words)
    settings = tiny_settings(tmp_path, defaults=True, heldout=0.0)
    precompute(settings)
    signal = sketch_of(settings.output)
    assert (signal.rank, signal.asked_rank) == (rank, 16)
    told = " ".join(capsys.readouterr().err.split())
    assert "these are fewer than 16, which need 128 calibration positions" in told
    assert precompute(settings) == open_cache(settings.output).manifest


def test_a_toy_teacher_has_a_sketch_of_four_and_more_draws_than_tokens(tmp_path):
    write_corpus(tmp_path / "corpus", files=2, words=60)
    write_teacher(tmp_path / "teacher", vocabulary=260, hidden_size=8, head_dim=2)
    toy = tiny_cache(tmp_path, defaults=True, counts=1024)
    assert sketch_of(toy.path).rank == 4
    read = toy.read(toy.rows())
    assert (read["counts"][read["loss_mask"]].sum(1) == 1024).all()


def test_a_sealed_cache_keeps_what_it_holds_where_settings_are_unset(root, head_only, tmp_path):
    cache = Path(shutil.copytree(head_only, tmp_path / "cache"))
    before = (cache / MANIFEST).read_bytes()
    precompute(without_counts_and_sketch(root, cache))
    assert (cache / MANIFEST).read_bytes() == before
    added = precompute(without_counts_and_sketch(root, cache, counts=20))
    assert set(added.signals) == {LOGITS, COUNTS}
    assert precompute(without_counts_and_sketch(root, cache)) == added


def test_a_new_part_has_the_signals_that_the_cache_has(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", files=3, words=60)
    tiny_cache(tmp_path, draws=4, profile="compact", counts=20)
    (corpus / "new.txt").write_text((corpus / "document-001.txt").read_text() + " again")
    manifest = precompute(without_counts_and_sketch(tmp_path, tmp_path / "cache"))
    assert [set(part.signals) for part in manifest.parts] == [{LOGITS, COUNTS}] * 2


def test_a_sealed_full_sketch_is_kept_too(root, tmp_path):
    full = tiny_settings(
        root, output=tmp_path / "cache", defaults=True, draws=4, sketch=Sketch("full", step=1.0)
    )
    sealed = precompute(full)
    assert precompute(without_counts_and_sketch(root, full.output)) == sealed


def test_a_sketch_asked_for_by_its_rank_keeps_the_step_that_it_has(root, tmp_path):
    """Releases before 0.15 had another step by default."""
    older = tiny_settings(root, output=tmp_path / "cache", sketch=Sketch(8, step=1.0, dither=False))
    sealed = precompute(older)
    assert precompute(tiny_settings(root, output=older.output, sketch=Sketch(8))) == sealed
    with pytest.raises(ValueError, match=r"sketch"):
        precompute(tiny_settings(root, output=older.output, sketch=Sketch(8, step=2.0)))


def test_a_capture_begun_before_there_were_counts_goes_on_without(root, head_only, tmp_path):
    cache = Path(shutil.copytree(head_only, tmp_path / "cache"))
    manifest = (cache / MANIFEST).read_bytes()
    (cache / MANIFEST).unlink()
    request = part_layout(cache, 0).request
    write_json(request, {n: v for n, v in read_json(request).items() if n not in (COUNTS, SKETCH)})
    precompute(without_counts_and_sketch(root, cache))
    assert (cache / MANIFEST).read_bytes() == manifest


def test_other_defaults_of_an_older_release_are_named_with_the_flags_that_keep_them(root, tmp_path):
    output = tmp_path / "cache"
    old = tiny_settings(root, output=output, k=32, draws=16, profile="compact")
    sealed = precompute(old)
    with pytest.raises(ValueError, match="another capture") as refused:
        precompute(tiny_settings(root, output=output, defaults=True))
    assert str(refused.value).splitlines() == [
        f"{output}: this directory holds another capture",
        "  signals.logits.k: there 32, asked for 8",
        "  signals.logits.draws: there 16, asked for 0",
        "These were the defaults before 0.11. To go on with what is there, add --signals.logits.k "
        "32 --signals.logits.draws 16, or k = 32 and draws = 16 below [signals.logits] of the "
        "config file. For a new capture choose another output.",
    ]
    kept = tiny_settings(root, output=output, defaults=True, k=32, draws=16)
    assert precompute(kept) == sealed


@pytest.mark.parametrize(
    ("there", "asked", "says"),
    [
        (
            {"draws": 4, "draw_temperatures": (1.0, 2.0)},
            {"draws": 4},
            "draw_temperatures: there [1.0, 2.0], asked for [1.0]\nTo go on with what is there, "
            "add --signals.logits.draw-temperatures 1.0 2.0, or draw_temperatures = [1.0, 2.0]",
        ),
        (
            {"profile": "fast"},
            {"profile": "compact"},
            'add --signals.logits.profile fast, or profile = "fast" below [signals.logits]',
        ),
        ({}, {"mass": 0.9}, "mass: there unset, asked for 0.9\nChoose another output"),
    ],
)
def test_other_settings_of_the_logits_are_named_like_that_too(tmp_path, there, asked, says):
    write_corpus(tmp_path / "corpus", files=1, words=40)
    precompute(tiny_settings(tmp_path, heldout=0.0, **there))
    with pytest.raises(ValueError, match="another capture") as refused:
        precompute(tiny_settings(tmp_path, heldout=0.0, **asked))
    assert says in str(refused.value)


def test_draw_temperatures_without_draws_are_refused():
    with pytest.raises(ValueError, match=r"draw_temperatures is \[1\.0, 2\.0\], but no draws"):
        Logits(draw_temperatures=(1.0, 2.0)).target_spec()
    assert dataclasses.replace(Logits(), draws=16, draw_temperatures=(1.0, 2.0)).target_spec()
