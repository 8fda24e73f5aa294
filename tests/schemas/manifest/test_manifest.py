"""Sealing and opening: only a sealed cache of this format opens; errors give the reason."""

import contextlib
import dataclasses
import json
import threading

import pytest

from decant.schemas import open_cache
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.manifest.manifest import (
    Manifest,
    Part,
    manifest_id,
    manifest_named,
    parse_manifest,
    read_manifest,
    write_manifest,
)


def manifest(length: int = 8) -> Manifest:
    part = Part("parts/0000", "0" * 64, 4, (), {}, {}, ())
    return Manifest(sequence_length=length, vocabulary_size=9, tokenizer="0" * 64, parts=(part,))


def test_a_manifest_is_read_back_with_its_id(tmp_path):
    written = write_manifest(tmp_path, manifest(), replaces=None)
    assert read_manifest(tmp_path) == written
    assert read_manifest(tmp_path).cache_id == written.cache_id != ""


def test_of_two_sealers_the_second_gets_an_error(tmp_path):
    first = write_manifest(tmp_path, manifest(), replaces=None)
    with pytest.raises(RuntimeError, match=f"found {first.cache_id[:12]}"):
        write_manifest(tmp_path, manifest(16), replaces=None)
    write_manifest(tmp_path, manifest(16), replaces=first.cache_id)
    assert read_manifest(tmp_path).sequence_length == 16


def test_of_many_sealers_at_once_exactly_one_wins(tmp_path):
    won = []

    def seal(length: int) -> None:
        with contextlib.suppress(RuntimeError):
            won.append(write_manifest(tmp_path, manifest(length), replaces=None))

    threads = [threading.Thread(target=seal, args=(n,)) for n in range(2, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read_manifest(tmp_path).cache_id] == [manifest.cache_id for manifest in won]


def test_the_error_for_an_unfinished_capture_says_how_to_continue(tmp_path):
    (tmp_path / "parts").mkdir()
    with pytest.raises(ValueError, match=r"not sealed.*run the same `precompute` again"):
        open_cache(tmp_path)


def test_other_directories_are_not_caches(tmp_path):
    with pytest.raises(ValueError, match="not a cache"):
        open_cache(tmp_path)
    with pytest.raises(ValueError, match="no such cache directory"):
        open_cache(tmp_path / "nowhere")
    write_json(tmp_path / "manifest.json", {"format": "another"})
    with pytest.raises(ValueError, match="format 'another'"):
        open_cache(tmp_path)


def test_another_version_is_refused_by_number(tmp_path):
    write_manifest(tmp_path, manifest(), replaces=None)
    plain = read_json(tmp_path / "manifest.json")
    write_json(tmp_path / "manifest.json", plain | {"version": 6})
    with pytest.raises(ValueError, match="cache format version 6, this release reads 1 to 5"):
        open_cache(tmp_path)
    write_json(tmp_path / "manifest.json", plain | {"version": 3})  # of a bucket, on a disk
    with pytest.raises(ValueError, match="named as in a bucket"):
        open_cache(tmp_path)


def test_a_cache_of_rollouts_has_a_version_that_older_releases_refuse(tmp_path):
    plain = write_manifest(tmp_path, manifest(), replaces=None)
    assert read_json(tmp_path / "manifest.json")["version"] == 1
    (part,) = plain.parts
    parts = tuple(
        dataclasses.replace(part, path=path, writers=writers)
        for path, writers in {
            "parts/0000": {"a": 2, "": 7},
            "parts/0001": {"a": 9},
            "parts/0002": {},
        }.items()
    )
    # Two manifest parts of one directory: its rollouts count once.
    both = dataclasses.replace(plain, parts=(parts[0], *parts))
    write_manifest(tmp_path, both, replaces=plain.cache_id)
    data = (tmp_path / "manifest.json").read_bytes()
    assert read_json(tmp_path / "manifest.json")["version"] == 4
    assert list(read_manifest(tmp_path).writers.items()) == [("a", 11), ("", 7)]
    in_bucket = manifest_named(data, by_content=True)
    assert json.loads(in_bucket)["version"] == 5
    assert parse_manifest(in_bucket, where="bucket").by_content
    assert manifest_named(in_bucket, by_content=False) == data
    assert manifest_id(in_bucket) == manifest_id(data) == read_manifest(tmp_path).cache_id


def test_an_edited_manifest_is_damaged(tmp_path):
    write_manifest(tmp_path, manifest(), replaces=None)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sequence_length": 9}))
    with pytest.raises(ValueError, match="checksum mismatch"):
        open_cache(tmp_path)
