"""Counts and sketches through a capture: what is stored is what the plain teacher gives."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from decant.models import open_checkpoint
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Sketch
from decant.pipelines.upkeep.collect import collect
from decant.pipelines.upkeep.remove import remove_signals
from decant.schemas import Cache, open_cache
from decant.schemas.disk.identity import file_sha256
from decant.schemas.disk.layout import COUNTS, LOGITS, SKETCH, PartLayout
from decant.schemas.manifest.manifest import read_manifest
from decant.schemas.records.rows import next_tokens
from decant.schemas.signals import SketchSignal
from decant.schemas.targets.sketch import HEAD
from tests.formulas import sampling
from tests.making.caches import tiny_cache, tiny_settings, write_corpus

BOTH = {"counts": 20, "sketch": Sketch(rank=6, step=1.0)}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("counts-and-sketch")


@pytest.fixture(scope="module")
def cache(root) -> Cache:
    return tiny_cache(root, **BOTH)


@pytest.fixture(scope="module")
def logits_only(root) -> Path:
    return tiny_cache(root, output=root / "logits-only").path


@pytest.fixture(scope="module")
def rows(cache) -> dict[str, np.ndarray]:
    return cache.read(cache.rows(), signals=(LOGITS,))


@pytest.fixture(scope="module")
def dense(root, rows) -> np.ndarray:
    """The teacher's logits [rows, S, V] in float64, from its states."""
    states, unembedding = _states(root, rows)
    return states.astype(np.float64) @ unembedding.astype(np.float64)


def _states(root, rows) -> tuple[np.ndarray, np.ndarray]:
    model = open_checkpoint(str(root / "teacher")).load(dtype="float32")
    states, _ = model(rows["tokens"], rows["segment_ids"], rows["positions"])
    return np.asarray(states), np.asarray(model.unembedding())


def test_labels_are_the_log_probabilities_of_the_next_tokens(rows, dense):
    scored = rows["loss_mask"]
    labels = next_tokens(rows["tokens"])[scored]
    expected = sampling.log_softmax(dense[scored])[np.arange(len(labels)), labels]
    np.testing.assert_allclose(rows["label_logprobs"][scored], expected, atol=1e-4)
    assert (rows["label_logprobs"][~scored] == -np.inf).all()


def test_counts_sum_to_n_and_stay_within_one_of_each_share(rows, dense):
    scored = rows["loss_mask"]
    ids, counts = rows["count_ids"][scored], rows["counts"][scored]
    assert (counts.sum(1) == 20).all()
    often = np.zeros(dense[scored].shape)
    np.put_along_axis(often, ids, counts, axis=1)
    # Empty slots have id 0: their zeros must not hide what id 0 was counted.
    often[:, 0] = np.where((ids == 0) & (counts > 0), counts, 0).sum(1)
    assert np.abs(often - 20 * np.exp(sampling.log_softmax(dense[scored]))).max() < 1.001


def test_a_sketch_is_the_projected_state_to_half_a_step_and_its_head_gives_logits(
    root, cache, rows
):
    scored = rows["loss_mask"]
    states, unembedding = _states(root, rows)
    part = cache.manifest.parts[0]
    at = cache.path / part.path / "statistics"
    mean, projection, deviations = (
        np.load(at / f"sketch-{name}.npy") for name in ("mean", "projection", "deviations")
    )
    expected = (states[scored].astype(np.float64) - mean) @ projection
    step = deviations[-1]
    assert np.abs(rows["sketch"][scored] - expected).max() <= step / 2 * (1 + 1e-4)
    head = cache.sketch_head()
    np.testing.assert_allclose(head.bias, mean @ unembedding, atol=1e-4)
    stored = head.logits(rows["sketch"][scored])
    dense = states[scored] @ unembedding
    off = stored - dense
    off -= off.mean(1, keepdims=True)
    dense = dense - dense.mean(1, keepdims=True)
    assert (off**2).mean() < 0.5 * (dense**2).mean(), "most of the variance is kept"


def test_the_full_rank_gives_every_logit_back(root, rows, dense):
    full = tiny_cache(root, output=root / "full", sketch=Sketch(rank="full", step=0.0), k=4)
    read = full.read(full.rows())
    scored = read["loss_mask"]
    logits = full.sketch_head().logits(read["sketch"][scored])
    np.testing.assert_allclose(logits, dense[rows["loss_mask"]], atol=2e-4)


def test_added_later_they_equal_those_of_one_capture_and_no_other_file_changes(
    root, cache, logits_only, tmp_path
):
    grown = Path(shutil.copytree(logits_only, tmp_path / "cache"))
    before = {p: file_sha256(p) for p in grown.rglob("*") if p.is_file()}
    precompute(tiny_settings(root, output=grown, **BOTH))
    changed = {p.name for p, sha in before.items() if not p.exists() or file_sha256(p) != sha}
    assert changed == {"manifest.json"}
    added = open_cache(grown)
    ours, theirs = added.manifest.signals, cache.manifest.signals
    assert ours.keys() == theirs.keys()
    assert ours[SKETCH] == theirs[SKETCH]
    everything = cache.rows()
    one, other = cache.read(everything), added.read(everything)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert not list(grown.rglob("plan-adding-*"))


def test_removed_and_added_again(root, cache, tmp_path):
    again = Path(shutil.copytree(cache.path, tmp_path / "cache"))
    remove_signals(again, [COUNTS, SKETCH])
    collect(again)
    files = [path.as_posix() for path in again.rglob("*") if path.is_file()]
    assert not [path for path in files if "sketch" in path or "counts/" in path]
    assert set(read_manifest(again).signals) == {LOGITS}
    precompute(tiny_settings(root, output=again, **BOTH))
    np.testing.assert_array_equal(open_cache(again).read([0])["counts"], cache.read([0])["counts"])


def test_counts_without_stored_tokens(root, cache):
    alone = tiny_cache(root, output=root / "k-0", k=0, counts=20)
    read, beside = alone.read(alone.rows()), cache.read(cache.rows())
    assert read["topk_ids"].shape[2] == read["tail_logmass"].shape[2] == 0
    for name in ("count_ids", "counts"):
        np.testing.assert_array_equal(read[name], beside[name])
    np.testing.assert_allclose(read["label_logprobs"], beside["label_logprobs"], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"k": 0}, r"k is 0, so no token would be stored; ask for signals.logits.counts = 50"),
        ({"k": 0, "counts": 50, "sketch": Sketch(rank=4)}, r"sketch.rank is 4, which needs"),
        ({"counts": 5}, r"counts is 5; choose 8 to 1,024, or 0"),
        ({"sketch": Sketch(rank=33)}, r"sketch.rank is 33; .* 32 wide: choose at most 32"),
    ],
)
def test_settings_that_contradict_are_refused_before_anything_runs(root, tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        precompute(tiny_settings(root, output=tmp_path / "cache", **changes))
    assert not (tmp_path / "cache" / "parts").exists()


def test_another_rank_is_not_put_in_place_of_the_stored_one(root, cache):
    other = tiny_settings(root, output=cache.path, counts=20, sketch=Sketch(rank=5))
    with pytest.raises(ValueError, match=r"holds sketch with .*6.* asks for .*5"):
        precompute(other)


def test_a_sample_too_small_for_the_rank_gives_a_smaller_one_and_says_so(root, tmp_path, capsys):
    settings = tiny_settings(root, output=tmp_path / "cache", sketch=Sketch(rank=31))
    corpus = dataclasses.replace(settings.corpus, max_bytes=500, heldout=0.0)
    settings = dataclasses.replace(settings, corpus=corpus)
    precompute(settings)
    signal = read_manifest(tmp_path / "cache").signals[SKETCH]
    assert isinstance(signal, SketchSignal)
    assert signal.rank < 31
    precompute(settings)  # asks for what it asked for before


def test_new_parts_keep_the_basis_unless_their_text_has_drifted(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", files=4)
    settings = tiny_settings(tmp_path, sketch=Sketch(rank=3), counts=8, heldout=0.0)
    precompute(settings)
    (corpus / "more.txt").write_text((corpus / "document-001.txt").read_text() + " again")
    precompute(settings)
    assert len(open_cache(settings.output).sketch_heads()) == 1
    assert "basis of their own" not in capsys.readouterr().err
    (corpus / "other.txt").write_text((corpus / "document-002.txt").read_text()[::-1])
    precompute(settings)
    grown = open_cache(settings.output)
    assert len(grown.sketch_heads()) == 2
    assert "these texts differ too much" in " ".join(capsys.readouterr().err.split())
    assert set(grown.read(grown.rows())["sketch_basis"].tolist()) == {0, 1}
    first, second, own = (
        PartLayout(settings.output / part.path).statistics / f"{HEAD}.npy"
        for part in grown.manifest.parts
    )
    assert first.samefile(second)  # the disk holds a basis once
    assert not first.samefile(own)


def test_a_full_sketch_says_the_size_of_its_head_before_it_begins(root, capsys, tmp_path):
    settings = tiny_settings(root, output=tmp_path / "cache", sketch=Sketch(rank="full"))
    precompute(settings)
    out = " ".join(capsys.readouterr().err.split())
    assert out.index('rank "full" takes 69.6 kB in each part') < out.index("calibrate:")
