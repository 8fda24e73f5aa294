"""Captures of a corpus in a bucket: the cache of a local copy, and nothing is hashed twice."""

import dataclasses
import json
from pathlib import Path

import pytest

from decant.models import open_checkpoint
from decant.pipelines.capture.estimate import RemoteCost, remote_costs
from decant.pipelines.capture.job import precompute
from decant.pipelines.rows.sources import SourceFile
from decant.schemas.disk.steps import Step
from decant.store import open_store
from decant.store.objects import ObjectStore
from tests.killing import killer
from tests.making.caches import tiny_settings, write_teacher


@pytest.fixture
def settings(tmp_path, bucket, monkeypatch):
    """Settings that capture from the bucket; `tmp_path/corpus` holds the same files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "digests"))
    settings = tiny_settings(tmp_path)
    for path in (tmp_path / "corpus").iterdir():
        open_store(bucket).put(path.name, path.read_bytes())
    corpus = dataclasses.replace(settings.corpus, files=(f"{bucket}/*.txt",))
    return dataclasses.replace(settings, corpus=corpus)


def content(cache: Path) -> dict[str, bytes]:
    paths = (path for path in cache.rglob("*") if path.is_file())
    return {p.relative_to(cache).as_posix(): p.read_bytes() for p in paths}


def test_the_cache_is_that_of_a_local_copy(settings, tmp_path):
    precompute(settings)
    there = content(settings.output)
    local = tiny_settings(tmp_path, output=tmp_path / "local")
    precompute(local)
    here = content(local.output)
    name = "parts/0000/request.json"
    written, plain = json.loads(there.pop(name)), json.loads(here.pop(name))
    assert len(written.pop("remote")["digests"]) == 12
    assert written | {"checksum": ""} == plain | {"checksum": ""}
    assert there == here


def test_a_plan_names_what_lies_at_addresses_and_how_much(tmp_path):
    def source(path: str, size: int) -> SourceFile:
        return SourceFile("name", path, size, "")

    commit = f"hf://datasets/o/n@{'a' * 40}"
    sources = [
        *(source("/here/a.txt", 1), source("s3://b/x/a.txt", 2), source("s3://b/y.txt", 3)),
        *(source("gs://b/a.txt", 4), source(f"{commit}/a/b.txt", 5)),
    ]
    here = open_checkpoint(write_teacher(tmp_path / "teacher"))
    there = dataclasses.replace(here, name="s3://b/m")
    weights = here.files.weight_bytes
    of_corpus = {
        "s3://b": RemoteCost(2, 5), "gs://b": RemoteCost(1, 4), commit: RemoteCost(1, 5)
    }  # fmt: skip
    assert remote_costs(sources, here) == of_corpus
    assert remote_costs(sources, there) == of_corpus | {"s3://b/m": RemoteCost(1, weights)}


@pytest.mark.slow
def test_a_capture_that_was_killed_goes_on_elsewhere_without_reading_the_corpus(
    settings, tmp_path, bucket, monkeypatch
):
    arguments = [
        *("precompute", f"--corpus.files={bucket}/*.txt", "--corpus.sequence-length=64"),
        *("--corpus.heldout=0.2", "--corpus.shard-bytes=8192", "--teacher.batch-rows=2"),
        *(f"--teacher.model={tmp_path}/teacher", f"--output={settings.output}"),
        *("--signals.logits.k=8", "--signals.logits.draws=0", "--signals.logits.profile=lossless"),
        *("--signals.logits.counts=0", "--signals.logits.sketch.rank=0"),
    ]
    with killer(tmp_path / "log") as processes:
        processes.kill(Step.ROWS_GATHERED, arguments)
    # Another machine, which has nothing but the capture's directory.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    read = []
    monkeypatch.setattr(ObjectStore, "get", lambda self, key, **_: read.append(key))
    resumed = precompute(settings)
    assert not read
    local = tiny_settings(tmp_path, output=tmp_path / "local")
    assert precompute(local) == resumed
