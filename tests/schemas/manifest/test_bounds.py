"""Numbers and ids of a manifest or plan that no release writes are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from decant.schemas.disk.atomic import write_json
from decant.schemas.manifest.manifest import read_manifest
from decant.schemas.manifest.plan import read_plan
from tests.fuzzing.cache_targets import manifests, plans

TYPE = "Type-check error"
"""Of the types that tests check: it comes first for a value of another type."""
PART = ("parts", 0)
UNIT = (*PART, "units", 1)
HIDDEN = (*PART, "signals", "hidden/1")
LOGITS = (*PART, "signals", "logits")
MAPS = (*PART, "signals", "attention/0")


def changed(value: Any, place: tuple, new: Any) -> Any:
    """The JSON `value` with `new` at `place`."""
    at = value
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = new
    return value


def test_the_manifests_and_the_plan_below_are_read_as_they_are(tmp_path):
    for value in map(json.loads, manifests(tmp_path)):
        write_json(tmp_path / "manifest.json", value)
        read_manifest(tmp_path)
    write_json(tmp_path / "plan.json", json.loads(plans(tmp_path)[0]))
    read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("place", "new", "name"),
    [
        (("sequence_length",), 1 << 40, "sequence_length"),
        (("sequence_length",), True, "sequence_length"),
        (("vocabulary_size",), 0, "vocabulary_size"),
        (("vocabulary_size",), 512.0, "vocabulary_size"),
        (("tokenizer",), "<script>", "tokenizer"),
        (("cache_id",), "\x1b[2J", "cache_id"),
        ((*PART, "rows_id"), "A" * 64, "rows_id"),
        ((*PART, "unit_rows"), 10**12, "unit_rows"),
        ((*PART, "statistics", "directions-1.npy"), "../x", "statistics directions-1.npy"),
        ((*PART, "sources", 0, "sha256"), None, "sha256 of a source"),
        ((*UNIT, "split"), "test", "split"),
        ((*UNIT, "rows"), 5, "rows of a unit"),
        ((*UNIT, "tokens"), 73, "tokens of a unit"),
        ((*UNIT, "scored"), -1, "scored of a unit"),
        ((*UNIT, "skipped_rows"), [3], "skipped_rows"),
        ((*UNIT, "skipped_rows"), [1, 1], "skipped_rows"),
        ((*UNIT, "files", "rows", "bytes"), 1 << 70, "bytes of rows"),
        ((*UNIT, "files", "rows", "records"), "3", "records of rows"),
        ((*UNIT, "files", "rows", "sha256"), "", "sha256 of rows"),
        ((*UNIT, "files", "rows", "fingerprint"), "0", "fingerprint of rows"),
        ((*UNIT, "files"), {}, "a unit has no files of"),
        ((*LOGITS, "k"), 301, "k of logits"),
        ((*LOGITS, "draws"), 1 << 16, "draws of logits"),
        ((*LOGITS, "betas"), [0.0, 1.0], "betas of logits"),
        ((*LOGITS, "draw_betas"), [0.3], "draw_betas of logits"),
        ((*LOGITS, "profile"), "other", "profile of logits"),
        ((*LOGITS, "signal_id"), "x", "signal_id of logits"),
        ((*LOGITS, "teacher_id"), 3, "teacher_id of logits"),
        ((*HIDDEN, "width"), 33, "width of hidden/1"),
        ((*HIDDEN, "teacher_width"), 1 << 40, "teacher_width of hidden/1"),
        ((*HIDDEN, "layer"), -1, "layer of hidden/1"),
        ((*HIDDEN, "dtype"), "float128", "dtype of hidden/1"),
        ((*HIDDEN, "shard_rows"), 0, "shard_rows of hidden/1"),
        ((*HIDDEN, "variance_kept"), float("nan"), "variance_kept of hidden/1"),
        ((*MAPS, "heads"), [4], "heads of attention/0"),
        ((*MAPS, "heads"), [], "number of heads of attention/0"),
        ((*MAPS, "teacher_heads"), 10**9, "teacher_heads of attention/0"),
    ],
)
def test_a_value_of_a_manifest_out_of_its_bounds_is_refused(place, new, name, tmp_path):
    value = changed(json.loads(manifests(tmp_path)[0]), place, new)
    write_json(tmp_path / "manifest.json", value)
    with pytest.raises(ValueError, match=rf"{tmp_path}/manifest\.json: .*({name}|{TYPE})"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("place", "new", "name"),
    [
        ((*PART, "numbers"), [0, 5], "beyond the 5 of its plan"),
        ((*PART, "numbers"), [0], "1 numbers of 2 units"),
        ((*PART, "forgotten", 0, "source"), 1, "forgotten source"),
        ((*PART, "forgotten_rows"), [[3, 3]], "offset of a forgotten row"),
        ((*PART, "forgotten_rows"), [[1, 0]], "unit of a forgotten row"),
    ],
)
def test_so_is_one_of_a_part_with_forgotten_documents(place, new, name, tmp_path):
    value = changed(json.loads(manifests(tmp_path)[1]), place, new)
    write_json(tmp_path / "manifest.json", value)
    with pytest.raises(ValueError, match=name):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("place", "new", "name"),
    [
        (("teacher", "sequence_length"), 10**9, "sequence_length"),
        (("teacher", "batch_rows"), 0, "batch_rows"),
        (("teacher", "mesh", "tensor"), -1, "mesh.tensor"),
        (("teacher", "quantize"), "int1", "quantize"),
        (("rows", "sample"), [[2, 0]], "unit of a sampled row"),
        (("canary",), [[0, 9]], "offset of a sampled row"),
    ],
)
def test_so_is_one_of_a_plan(place, new, name, tmp_path):
    path: Path = tmp_path / "plan.json"
    write_json(path, changed(json.loads(plans(tmp_path)[0]), place, new))
    with pytest.raises(ValueError, match=rf"{path}: .*({name}|{TYPE})"):
        read_plan(path)


def test_json_of_a_million_brackets_is_damaged(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text("[" * 1_000_000)
    with pytest.raises(ValueError, match=r"manifest\.json: damaged"):
        read_manifest(tmp_path)
