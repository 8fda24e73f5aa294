"""A cache in a bucket grows, forgets and is tidied as the same cache on a disk is."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from decant.pipelines.__main__ import main
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Attention, Hidden
from decant.pipelines.upkeep.collect import collect
from decant.pipelines.upkeep.copy import copy
from decant.pipelines.upkeep.forget import forget
from decant.pipelines.upkeep.remove import remove_signals
from decant.pipelines.verification.structure import check_structure
from decant.schemas import open_cache
from decant.schemas.disk.stand_in import working_folder
from decant.schemas.disk.steps import Step
from decant.schemas.manifest.manifest import read_manifest
from decant.store import open_store
from tests.making.caches import tiny_settings, write_corpus, write_teacher
from tests.making.grown import hashes

ARRAYS = {"hidden": Hidden(layers=(1,), dtype="int8"), "attention": Attention(layers=(1,))}


@pytest.fixture
def both(bucket, tmp_path, monkeypatch) -> tuple[Path, str]:
    """A directory and an address, with nothing in them yet."""
    monkeypatch.setenv("DECANT_MIRROR", str(tmp_path / "mirror"))
    write_teacher(tmp_path / "teacher")
    write_corpus(tmp_path / "corpus", files=3, words=100)
    return tmp_path / "cache", bucket


def capture(both: tuple[Path, str], *, places: tuple[int, ...] = (0, 1), **signals) -> None:
    for place in (both[number] for number in places):
        config = tiny_settings(both[0].parent, counts=20, **signals)
        precompute(dataclasses.replace(config, output=Path(place)))


def run_on(both: tuple[Path, str], command: str, *arguments: str) -> None:
    for place in both:
        assert main([command, str(place), *arguments]) == 0


def require_equal(both: tuple[Path, str]) -> None:
    """Both have the same id and values, and the copy of the one is the other, byte for byte."""
    disk, there = (open_cache(place) for place in both)
    assert there.manifest == disk.manifest
    assert there.manifest.cache_id == disk.manifest.cache_id
    names = list(disk.manifest.signals)
    read = there.read(there.rows(), names)
    for name, array in disk.read(disk.rows(), names).items():
        np.testing.assert_array_equal(read[name], array)
    back = both[0].parent / f"back-{disk.manifest.cache_id[:8]}"
    copy(both[1], back)
    assert check_structure(back, read_manifest(back)).problems == []
    ours, theirs = (
        {n: sha for n, sha in hashes(cache).items() if not n.endswith((".lock", ".tmp"))}
        for cache in (back, both[0])
    )
    assert ours == theirs


def test_it_gains_files_and_signals_forgets_and_is_overwritten(both, capsys):
    capture(both)
    (both[0].parent / "corpus" / "more.txt").write_text("the part keeps its promise " * 60)
    capture(both)
    capture(both, **ARRAYS)
    require_equal(both)
    reading = open_cache(both[1])
    expected = reading.read(reading.rows(), ["hidden/1"])["hidden/1"]
    run_on(both, "forget", "--source=document-001.txt")
    require_equal(both)
    before = set(keys(both[1]))
    run_on(both, "gc")
    told = capsys.readouterr().err
    assert "objects that the manifest does not name were written" in told
    assert "run `gc` again after" in told
    assert before <= set(keys(both[1])), "nothing goes while somebody may read it"
    read = reading.read(reading.rows(), ["hidden/1"])["hidden/1"]
    np.testing.assert_array_equal(read, expected)
    require_equal(both)
    run_on(both, "gc", "--grace-hours=0")
    gone = before - set(keys(both[1]))
    assert {key.partition("/")[0] for key in gone} == {"objects", "parts"}
    require_equal(both)
    run_on(both, "remove", "attention/1")
    run_on(both, "gc", "--grace-hours=0")
    require_equal(both)
    capture(both, **ARRAYS)
    require_equal(both)
    capsys.readouterr()
    assert main(["gc", both[1], "--dry-run", "--json"]) == 0
    left = json.loads(capsys.readouterr().out)["deleted"]
    assert all("plan-adding" in name or name.startswith("parts/") for name in left)


def keys(bucket: str) -> list[str]:
    return [key for key, _ in open_store(bucket).list()]


def test_verify_reads_every_object_and_repair_sends_again_those_that_differ(both, capsys):
    capture(both, places=(1,), **ARRAYS)
    assert main(["verify", both[1], "--rows=2"]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[-1].startswith(f"{both[1]}: fine, ")
    assert "and 2 rows as the teacher gives them" in told
    store = open_store(both[1])
    (unit, *_) = open_cache(both[1]).manifest.parts[0].units
    key = f"objects/{unit.files['logits'].sha256}.array_record"
    data = store.get(key)
    store.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    commit = json.loads(store.get("parts/0000/commits/hidden-1-unit-00001.json"))
    store.delete(f"objects/{commit['shards']['hidden/1'][0]['sha256']}")
    assert main(["verify", both[1], "--rows=0", "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [(p["signal"], p["unit"], p["got"].split()[0]) for p in problems] == [
        ("logits", 0, "sha256"),
        ("hidden/1", 1, "no"),
    ]
    assert main(["verify", both[1], "--repair", "--rows=0"]) == 0
    assert store.get(key) == data


def test_gc_leaves_all_as_it_is_while_a_capture_is_unfinished_and_finds_strays_after_it(
    both, capsys
):
    capture(both, places=(1,))
    store = open_store(both[1])
    store.put("objects/stray.npy", b"of a worker that was killed")
    store.put("parts/0001/request.json", store.get("parts/0000/request.json"))
    assert main(["gc", both[1], "--grace-hours=0"]) == 0
    assert "parts/0001 is being captured" in capsys.readouterr().err
    assert "objects/stray.npy" in keys(both[1])
    store.delete("parts/0001/request.json")
    assert main(["gc", both[1], "--grace-hours=0"]) == 0
    assert "objects/stray.npy" not in keys(both[1])
    cache = open_cache(both[1])
    assert len(cache.read(cache.rows())["tokens"]) == len(cache)


def test_of_two_machines_that_change_it_at_once_the_second_builds_on_the_first(both, monkeypatch):
    capture(both, places=(1,), **ARRAYS)
    cache = working_folder(both[1])
    first = [lambda: remove_signals(cache, ["attention/1"])]

    def locked(step: Step) -> None:
        """Between reading and swapping the manifest the other one swaps it."""
        if step is Step.MANIFEST_LOCKED and first:
            first.pop()()

    monkeypatch.setattr("decant.schemas.disk.steps.reached", locked)
    forget(cache, source="document-001.txt")
    manifest = open_cache(both[1]).manifest
    assert manifest.forgotten_id
    assert "attention/1" not in manifest.signals


def test_gc_that_finds_another_manifest_after_its_work_does_it_again_on_that(both, monkeypatch):
    capture(both, places=(1,), **ARRAYS)
    cache = working_folder(both[1])
    forget(cache, source="document-001.txt")
    first = [lambda: remove_signals(cache, ["attention/1"])]

    def locked(step: Step) -> None:
        if step is Step.MANIFEST_LOCKED and first:
            first.pop()()

    monkeypatch.setattr("decant.schemas.disk.steps.reached", locked)
    assert collect(cache, grace_hours=0.0).units > 0
    manifest = open_cache(both[1]).manifest
    assert "attention/1" not in manifest.signals
    assert collect(cache, dry_run=True).units == 0
