"""Counts and sketches are forgotten, overwritten, removed, deleted and checked like logits."""

import numpy as np
import pytest

from decant.pipelines.config import Sketch
from decant.pipelines.upkeep.collect import collect
from decant.pipelines.upkeep.forget import forget
from decant.pipelines.upkeep.remove import remove_signals
from decant.pipelines.verification.structure import check_structure
from decant.schemas import open_cache
from decant.schemas.disk.frames import Frame, Kind
from decant.schemas.disk.layout import COUNTS, SKETCH, part_layout
from tests.making.arrays import same_bits
from tests.making.caches import WORDS, tiny_cache
from tests.making.companions import with_companions
from tests.making.resealed import copy_of, records_of, with_records

KEYS = {COUNTS: {"count_ids", "counts"}, SKETCH: {"sketch", "sketch_basis"}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    cache = tiny_cache(
        tmp_path_factory.mktemp("upkeep"), shard_bytes=2048, profile="compact", draws=2
    )
    return with_companions(cache.path)


@pytest.fixture
def cache(whole, tmp_path):
    return open_cache(copy_of(whole, tmp_path / "cache"))


def problems(path):
    return check_structure(path, open_cache(path).manifest).problems


def test_a_cache_with_both_has_no_problem(cache):
    structure = check_structure(cache.path, cache.manifest)
    assert structure.problems == []
    assert structure.left_over == []


def test_forgotten_documents_have_neither_counts_nor_sketch_and_gc_overwrites_them(cache):
    rows = cache.rows()
    before = cache.read(rows)
    forget(cache.path, source=cache.manifest.parts[0].sources[0].name)
    forgotten = open_cache(cache.path)
    out = forgotten.read(rows)
    gone = before["loss_mask"] & ~out["loss_mask"]
    kept = out["loss_mask"]
    assert gone.any()
    assert kept.any()
    for name in ("count_ids", "counts", "sketch"):
        assert not out[name][gone].any()
        np.testing.assert_array_equal(out[name][kept], before[name][kept])
    files = [part_layout(cache.path, 0).records(name, 0) for name in (COUNTS, SKETCH)]
    old = [file.read_bytes() for file in files]
    collect(cache.path)
    assert [file.read_bytes() == data for file, data in zip(files, old, strict=True)] == [False] * 2
    assert problems(cache.path) == []
    after = open_cache(cache.path).read(rows)
    np.testing.assert_array_equal(after["loss_mask"], kept)
    for name in out:
        assert same_bits(after[name], out[name]), name


DRIFTING = {
    "full, dithered": {"sketch": Sketch(rank="full")},
    "r = 8": {"sketch": Sketch(rank=8)},
    "r = 8, exact": {"sketch": Sketch(rank=8, step=0.0), "profile": "lossless"},
    "r = 8, dithered, adaptive": {"sketch": Sketch(rank=8, dither=True), "k": 16, "mass": 0.9},
    "draws, fast": {"sketch": Sketch(rank=8), "draws": 5, "profile": "fast"},
}


SLOW = ("full, dithered", "draws, fast")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, settings in DRIFTING.items()
    ],
)
def test_what_is_kept_of_a_row_has_the_same_bits_after_any_number_of_gcs(tmp_path, settings):
    (tmp_path / "corpus").mkdir()
    for number in range(12):
        text = " ".join(WORDS[(i * i + number * i) % len(WORDS)] for i in range(11 + number % 3))
        (tmp_path / "corpus" / f"{number:02}.txt").write_text(text)
    settings = {"profile": "compact", "counts": 20, "heldout": 0.0, **settings}
    cache = tiny_cache(tmp_path, **settings)
    cuts = np.zeros(len(cache), int)
    for number in range(6):
        whole = open_cache(cache.path).read(range(len(cache)))["loss_mask"].sum(1)
        forget(cache.path, source=f"{number:02}.txt")
        forgotten = open_cache(cache.path)
        before = forgotten.read(range(len(forgotten)))
        left = before["loss_mask"].sum(1)
        cuts += (left < whole) & (left > 0)
        collect(cache.path)
        after = open_cache(cache.path).read(range(len(cache)))
        for name in before:
            assert same_bits(after[name], before[name]), (number, name)
    assert cuts.max() >= 2, "a row was written again, in part, more than once"
    assert problems(cache.path) == []


@pytest.mark.parametrize("name", [COUNTS, SKETCH])
def test_removed_they_are_gone_and_gc_deletes_their_files_and_statistics(cache, name):
    layout = part_layout(cache.path, 0)
    own = set(layout.statistics.glob(f"{name}-*"))
    assert own
    remove_signals(cache.path, [name])
    out = open_cache(cache.path).read([0])
    assert not KEYS[name] & out.keys()
    (other,) = KEYS.keys() - {name}
    assert KEYS[other] <= out.keys()
    left_over = check_structure(cache.path, open_cache(cache.path).manifest).left_over
    assert f"parts/0000/{name}" in left_over
    collect(cache.path)
    assert not (layout.root / name).exists()
    assert not any(file.exists() for file in own)
    assert problems(cache.path) == []
    assert KEYS[other] <= open_cache(cache.path).read([0]).keys()


@pytest.mark.parametrize("name", [COUNTS, SKETCH])
def test_a_damaged_file_is_found_with_its_signal_and_unit(cache, name):
    file = part_layout(cache.path, 0).records(name, 1)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = problems(cache.path)
    assert {(p.signal, p.unit, p.part) for p in found} == {(name, 1, "parts/0000")}


def test_a_record_of_another_row_or_number_of_positions_is_found(cache):
    records = records_of(cache.path, 0, signal=COUNTS)
    swapped = with_records(cache.path, {0: [records[1], records[0], *records[2:]]}, signal=COUNTS)
    found = problems(swapped.path)
    assert {p.signal for p in found} == {COUNTS}
    assert len(found) == 2
    # A row's key is the same in all of its records.
    key = records[0][12:28]
    empty = Frame(Kind.COUNTS, key, 0, ()).pack()
    (found,) = problems(with_records(cache.path, {0: [empty, *records[1:]]}, signal=COUNTS).path)
    assert (found.signal, found.unit, found.got) == (COUNTS, 0, "0")
    assert found.expected.startswith("record 0: ")
    assert found.expected.endswith(" positions")
