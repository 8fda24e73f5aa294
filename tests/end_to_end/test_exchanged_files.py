"""Files of two units that are exchanged are an error in reading, alone and as whole sets."""

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from decant.pipelines.capture import step_inputs
from decant.pipelines.config import Attention, Hidden
from decant.pipelines.upkeep.forget import forget
from decant.pipelines.upkeep.overwrite import overwrite_forgotten
from decant.schemas import Cache, open_cache
from decant.schemas.disk.array_record import fingerprint_of
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.disk.identity import digest
from tests.making.caches import tiny_cache, write_corpus

FILES = {
    "rows": "rows/unit-{:05d}.array_record",
    "logits": "logits/unit-{:05d}.array_record",
    "states": "hidden/1/c.{}.0.0",
    "scales": "hidden/1-scale/c.{}.0",
    "maps": "attention/1/c.{}.0.0.0",
    "commit of states": "commits/hidden-1-unit-{:05d}.json",
    "commit of maps": "commits/attention-1-unit-{:05d}.json",
}
SETS = (
    ("rows", "logits"),
    ("rows", "logits", "states", "scales"),
    ("rows", "logits", "states", "scales", "commit of states"),
    ("states", "scales", "commit of states"),
    ("maps", "commit of maps"),
    tuple(FILES),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    root = tmp_path_factory.mktemp("exchanged")
    write_corpus(root / "corpus", files=8, words=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_inputs, "choose_unit_rows", lambda *_, **__: 2)
        return tiny_cache(
            root,
            profile="compact",
            heldout=0.3,
            shard_bytes=1000,
            hidden=Hidden(layers=(1,), dtype="int8"),
            attention=Attention(layers=(1,)),
        )


def exchange(cache: Cache, kinds: Sequence[str], units: Sequence[int]) -> None:
    """Exchange these files of two units; a second call puts them back."""
    for kind in kinds:
        a, b = (cache.path / "parts" / "0000" / FILES[kind].format(n) for n in units)
        content = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(content)


def read_all(path: Path) -> None:
    cache = open_cache(path)
    cache.read(cache.rows(), signals=tuple(cache.manifest.signals))


@pytest.mark.parametrize("kinds", [*((kind,) for kind in FILES), *SETS], ids="+".join)
def test_exchanged_files_of_any_two_units_are_an_error(cache, kinds):
    units = range(len(cache.manifest.parts[0].units))
    assert len(units) >= 5
    for pair in itertools.combinations(units, 2):
        exchange(cache, kinds, pair)
        try:
            with pytest.raises(ValueError, match=r"fingerprint|commit|swapped|damaged") as error:
                read_all(cache.path)
        finally:
            exchange(cache, kinds, pair)
        assert any(f"{n}" in str(error.value) for n in pair)
    read_all(cache.path)


def test_the_error_names_the_file_and_both_fingerprints(cache):
    path = cache.path / "parts/0000/rows/unit-00000.array_record"
    expected = cache.manifest.parts[0].units[0].files["rows"].fingerprint
    assert expected == fingerprint_of(path)
    exchange(cache, ["rows"], (0, 1))
    got = fingerprint_of(path)
    with pytest.raises(ValueError, match=f"{path}: expected fingerprint {expected}, got {got}"):
        cache.origins(0)
    exchange(cache, ["rows"], (0, 1))


def test_a_cache_of_an_older_release_is_read_as_before_and_keeps_its_bytes(cache, tmp_path):
    older = without_fingerprints(cache, tmp_path)
    read_all(older.path)
    forget(older.path, source="document-000.txt")
    assert overwrite_forgotten(older.path)
    read_all(older.path)
    kept = {path: unit for path, unit in units_of(older.path) if "rows" in unit["files"]}
    new = {path for path, unit in kept.items() if "fingerprint" in unit["files"]["rows"]}
    assert 0 < len(new) < len(kept), "only the units that were written again have fingerprints"


def units_of(path: Path):
    units = read_json(path / "manifest.json")["parts"][0]["units"]
    return list(enumerate(units))


def without_fingerprints(cache: Cache, to: Path) -> Cache:
    """A copy of the cache as 0.7 wrote it."""
    shutil.copytree(cache.path, to / "older")
    value = read_json(to / "older" / "manifest.json")
    del value["cache_id"]
    for unit in value["parts"][0]["units"]:
        for entry in unit["files"].values():
            entry.pop("fingerprint", None)
    write_json(to / "older" / "manifest.json", {**value, "cache_id": digest(value)})
    return open_cache(to / "older")
