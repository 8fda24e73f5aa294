"""Long documents are read and tokenised in pieces: the same rows, in little memory."""

import gzip
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from decant.models.text import tokenizer
from decant.models.text.long_texts import LongTexts
from decant.pipelines.config import Corpus
from decant.pipelines.rows import marking, records
from decant.pipelines.rows.documents import Document, read_documents, with_kinds
from decant.pipelines.rows.long_text import LongArray, LongText
from decant.pipelines.rows.shard import TokeniseJob, document_hashes, tokenise_shard
from decant.pipelines.rows.sources import cut_shards, find_sources
from decant.schemas.disk.atomic import read_json
from tests.making.caches import TEXT, tokenizer_files
from tests.paths import environment

CASES = {
    "ordinary": "One é two 🙂 three.\n".encode() * 20,
    "marked": b"\xef\xbb\xbfOne two\xef\xbb\xbf three " * 20,
    "a broken character": b"One two three " * 20 + b"\xc3(" + b"four",
    "a broken character at the end": b"One two three " * 20 + b"\xf0\x9f",
    "utf16": ("One two three" * 20).encode("utf-16"),
}


def read(path: Path, folder: Path) -> tuple[list[Document], list[str]]:
    sources = find_sources([str(path)], max_bytes=None, memory=folder / "memory")
    sources, refused = with_kinds(sources, text_field="text"), []
    (shard,) = cut_shards(sources, shard_bytes=1 << 20)
    documents = read_documents(
        shard, sources, text_field="text", refuse=lambda _, why: refused.append(why)
    )
    return list(documents), refused


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("block", [2, 3, 100])
@pytest.mark.parametrize("case", CASES)
def test_a_long_file_is_read_as_a_short_one(tmp_path, monkeypatch, case, block, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(gzip.compress(CASES[case]) if suffix else CASES[case])
    short, refused = read(path, tmp_path)
    monkeypatch.setattr(records, "LONG", 100)
    monkeypatch.setattr(records, "_BLOCK", block)
    long, long_refused = read(path, tmp_path)
    assert long_refused == refused
    assert [document.content_hash for document in long] == [d.content_hash for d in short]
    for one, other in zip(long, short, strict=True):
        assert isinstance(one.content, LongText)
        for _ in range(2):
            assert "".join(one.content.chunks()) == other.content


def test_a_long_compressed_file_that_is_cut_short_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONG", 100)
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(np.random.default_rng(0).bytes(5000).hex().encode())[:-9])
    documents, (problem,) = read(path, tmp_path)
    assert documents == []
    assert problem.startswith("damaged or cut short, cannot be decompressed: ")


def test_an_array_in_a_file_is_read_in_slices():
    array = LongArray("int32")
    array.append(np.arange(5))
    assert array[1:3].tolist() == [1, 2]
    array.append(np.array([70_000]))
    assert (len(array), array.max(initial=0), array[4:9].tolist()) == (6, 70_000, [4, 70_000])
    array.cut(3)
    assert array[:].tolist() == [0, 1, 2]


def make_job(folder: Path, corpus: Path) -> TokeniseJob:
    for name, data in tokenizer_files(512).items():
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer" / name).write_bytes(data)
    sources = find_sources([str(corpus / "*")], max_bytes=None, memory=folder / "memory")
    return TokeniseJob(
        part=folder / "part",
        tokenizer=folder / "tokenizer",
        sources=tuple(with_kinds(sources, text_field="text")),
        corpus=Corpus(sequence_length=64, heldout=0.1, shard_bytes=1 << 30, on_error="skip"),
        unit_rows=512,
        vocabulary=512,
    )


def tokenised(job: TokeniseJob) -> dict[str, bytes]:
    (shard,) = cut_shards(job.sources, shard_bytes=job.shard_bytes)
    list(document_hashes(shard, job))
    tokenise_shard(shard, frozenset(), job)
    return {p.name: p.read_bytes() for p in sorted(job.part.rglob("*")) if p.is_file()}


def test_rows_of_long_documents_are_those_of_documents_read_at_once(tmp_path, monkeypatch):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    text = f"{TEXT}\n" * (40_000 // len(TEXT))
    (corpus / "a.txt").write_text("short")
    (corpus / "b.txt").write_text(text)
    (corpus / "c.txt").write_bytes(text.encode() + b"\xff")
    prompt = {"prompt": text, "completion": text[::-1]}
    (corpus / "d.jsonl").write_text("\n".join(map(json.dumps, [prompt, prompt | {"prompt": ""}])))
    at_once = tokenised(make_job(tmp_path / "1", corpus))
    monkeypatch.setattr(records, "LONG", 10_000)
    monkeypatch.setattr(marking, "_LONG", 10_000)
    monkeypatch.setattr(tokenizer, "LongTexts", partial(LongTexts, piece=5000, beyond=500))
    assert tokenised(make_job(tmp_path / "2", corpus)) == at_once
    commit = read_json(next((tmp_path / "2").rglob("shard-*.json")))
    assert [item["source"] for item in commit["skipped"]] == ["c.txt"]


MEASURE = """
import pathlib, resource, sys
from tests.pipelines.rows.test_long_text import make_job, tokenised
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
root = pathlib.Path(sys.argv[1])
tokenised(make_job(root / "small", root / "small-corpus"))
before = peak()
tokenised(make_job(root / "large", root / "large-corpus"))
print(peak() - before)
"""


def test_a_document_of_2_mb_takes_little_more_memory_than_a_small_one(tmp_path):
    """It took 230 MB."""
    for size, characters in (("small", 1_000), ("large", 2_000_000)):
        text = TEXT * (characters // len(TEXT))
        (tmp_path / f"{size}-corpus").mkdir()
        (tmp_path / f"{size}-corpus" / "a.txt").write_text(text)
        (tmp_path / f"{size}-corpus" / "b.jsonl").write_text(json.dumps({"text": text[1:]}))
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    megabytes = int(subprocess.check_output(command, env=environment()))
    assert megabytes < 120
