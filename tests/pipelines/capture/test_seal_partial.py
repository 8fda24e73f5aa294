"""`--seal-partial`: committed units become a part; the rest follows as another part."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Attention, Hidden
from decant.pipelines.upkeep.collect import collect
from decant.pipelines.upkeep.forget import forget
from decant.pipelines.upkeep.garbage import unnamed
from decant.pipelines.verification.structure import check_structure
from decant.pipelines.verification.verify import verify
from decant.schemas import Cache, open_cache
from decant.schemas.disk import steps
from decant.schemas.disk.identity import digest_memory
from decant.schemas.disk.layout import part_layout
from decant.schemas.disk.steps import Step
from decant.schemas.reading.units import read_unit_rows
from tests.making.caches import tiny_cache, tiny_settings, write_corpus

SIGNALS = {
    "profile": "compact",
    "draws": 2,
    "shard_bytes": 2048,
    "hidden": Hidden(layers=(1,), dtype="int8", width=6),
    "attention": Attention(layers=(1,)),
}
NAMES = ("logits", "hidden/1", "attention/1")


class Stop(RuntimeError):
    pass


def interrupted(config, monkeypatch, *, units: int) -> None:
    """Capture until `units` more units are committed, then stop."""
    left = units

    def stop(step: Step) -> None:
        nonlocal left
        left -= step == Step.UNIT_COMMITTED
        if not left:
            raise Stop("stop here")

    with monkeypatch.context() as patch:
        patch.setattr(steps, "reached", stop)
        with pytest.raises(RuntimeError, match="stop here"):
            precompute(config)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("partial")
    write_corpus(root / "corpus", files=5, words=120)
    return root


@pytest.fixture(scope="module")
def whole(root) -> Cache:
    return tiny_cache(root, **SIGNALS)


def test_committed_units_are_sealed_and_the_rest_follows_in_parts_that_read_as_the_whole(
    root, whole, monkeypatch
):
    config = tiny_settings(root, output=root / "in-parts", **SIGNALS)
    sealing = dataclasses.replace(config, seal_partial=True)
    with pytest.raises(ValueError, match="no capture is unfinished"):
        precompute(sealing)
    readers: list[tuple[Cache, dict]] = []
    for _ in range(2):
        interrupted(config, monkeypatch, units=2)
        precompute(sealing)
        reader = open_cache(config.output)
        readers.append((reader, reader.read(reader.rows(), NAMES)))
        assert check_structure(config.output, reader.manifest).problems == []
        assert list(unnamed(config.output)) == []
    with pytest.raises(ValueError, match="no unit is committed that is not sealed already"):
        precompute(sealing)
    precompute(config)
    cache = open_cache(config.output)
    parts = cache.manifest.parts
    assert [len(part.units) for part in parts[:2]] == [2, 2]
    assert len({part.path for part in parts}) == 1
    assert len(set(cache.manifest.rows_ids)) == 3
    _require_rows_of(whole, cache)
    for reader, read in readers:
        for where in (reader, cache):
            again = where.read(reader.rows(), NAMES)
            for name, array in read.items():
                np.testing.assert_array_equal(again[name], array, err_msg=name)
    np.testing.assert_array_equal(cache.tail_prior(), whole.tail_prior())
    np.testing.assert_array_equal(cache.directions("hidden/1"), whole.directions("hidden/1"))
    report = verify(config.output, rows=12, teacher=None, memory=digest_memory())
    assert report.status == 0, report
    assert len(report.content) == 3
    with pytest.raises(ValueError, match="no capture is unfinished"):
        precompute(sealing)


def _require_rows_of(whole: Cache, cache: Cache) -> None:
    """Each unit has the rows and signals of the unit with its number in the cache `whole`."""
    (part,) = whole.manifest.parts
    first = np.concatenate([[0], np.cumsum([unit.rows for unit in part.units])])
    order = [
        np.arange(first[number], first[number + 1])
        for sealed in cache.manifest.parts
        for number, _ in sealed.numbered_units
    ]
    rows = np.concatenate(order)
    assert sorted(rows.tolist()) == list(range(len(whole)))
    expected, arrays = whole.read(rows, NAMES), cache.read(range(len(cache)), NAMES)
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def test_a_capture_that_was_sealed_in_part_while_it_ran_seals_the_rest(root, whole, monkeypatch):
    config = tiny_settings(root, output=root / "meanwhile", **SIGNALS)
    left = 3

    def seal_meanwhile(step: Step) -> None:
        nonlocal left
        left -= step == Step.UNIT_COMMITTED
        if not left:
            left = -1
            precompute(dataclasses.replace(config, seal_partial=True))

    monkeypatch.setattr(steps, "reached", seal_meanwhile)
    precompute(config)
    cache = open_cache(config.output)
    assert [len(part.units) for part in cache.manifest.parts][:1] == [3]
    _require_rows_of(whole, cache)
    assert not part_layout(config.output, 0).work.exists()


def test_signals_are_added_to_a_cache_that_was_sealed_in_parts(root, whole, monkeypatch, tmp_path):
    config = tiny_settings(root, output=tmp_path / "cache", **SIGNALS)
    interrupted(config, monkeypatch, units=3)
    precompute(dataclasses.replace(config, seal_partial=True))
    more = Hidden(layers=(1, 0), dtype="int8", width=6)
    precompute(tiny_settings(root, output=tmp_path / "cache", **{**SIGNALS, "hidden": more}))
    cache = open_cache(tmp_path / "cache")
    assert [set(part.signals) for part in cache.manifest.parts] == [{*NAMES, "hidden/0"}] * 2
    assert verify(cache.path, rows=8, teacher=None, memory=digest_memory()).status == 0


def test_a_damaged_unit_of_one_part_is_found_in_no_other_part(root, monkeypatch, tmp_path):
    path = Path(shutil.copytree(root / "in-parts", tmp_path / "cache"))
    cache = open_cache(path)
    second = cache.manifest.parts[1]
    number = second.unit_numbers[1]
    file = next(part_layout(path, 0).array("hidden/1").glob(f"c.{number}.*"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    problems = check_structure(path, cache.manifest).problems
    assert {(p.signal, p.unit) for p in problems} == {("hidden/1", number)}
    cache.read(range(sum(unit.rows for unit in cache.manifest.parts[0].units)), NAMES)
    with pytest.raises(ValueError, match=rf"hidden/1, unit {number}, row"):
        cache.read(cache.rows(), NAMES)


def test_a_source_forgotten_between_two_seals_of_a_directory_does_not_come_back(root, monkeypatch):
    config = tiny_settings(root, output=root / "forgotten", **SIGNALS)
    interrupted(config, monkeypatch, units=1)
    precompute(dataclasses.replace(config, seal_partial=True))
    partial = open_cache(config.output)
    (part,) = partial.manifest.parts
    rows = read_unit_rows(
        config.output / part.path,
        *next(part.numbered_units),
        length=partial.manifest.sequence_length,
    )
    source = part.sources[int(rows[0].origins[0, 0])].name
    forget(config.output, source=source)
    assert collect(config.output).units > 0  # canary rows are among them
    precompute(config)
    cache = open_cache(config.output)
    assert len(cache.manifest.parts) == 2
    number = next(n for n, s in enumerate(part.sources) if s.name == source)
    for part in cache.manifest.parts:
        assert [(f.source, f.document) for f in part.forgotten] == [(number, None)]
    assert verify(config.output, rows=6, teacher=None, memory=digest_memory()).status == 0
    listed = {tuple(pair) for part in cache.manifest.parts for pair in part.forgotten_rows}
    wholly = {
        (n, offset)
        for part in cache.manifest.parts
        for n, unit in part.numbered_units
        for offset, row in enumerate(
            read_unit_rows(
                config.output / part.path, n, unit, length=partial.manifest.sequence_length
            )
        )
        if set(row.origins[:, 0].tolist()) == {number}
    }
    assert listed == wholly != set()
    collect(config.output)
    assert verify(config.output, rows=6, teacher=None, memory=digest_memory()).status == 0
