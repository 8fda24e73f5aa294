"""A corpus in a bucket: the rows of a local copy, read by ranges, and hashed once."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from decant.pipelines.capture.step_inputs import corpus_sources, decided_corpus, identify_rows
from decant.pipelines.config import Corpus, SourceGroup
from decant.pipelines.rows.documents import read_documents
from decant.pipelines.rows.matching import matches, matching_files
from decant.pipelines.rows.sources import InputShard, SourceFile, cut_shards
from decant.store import StoreError, open_store
from decant.store.objects import ObjectStore

TEXTS = [f"document number {i} says {'word ' * (i % 37)}" for i in range(400)]
JUNK = 1 << 12
"""Bytes of a column that holds no text, in each row."""
SHARD = 8192
FOOTER = 1 << 16
"""Bytes that are read at the end of a Parquet file, where the row groups are listed."""


def write_corpus(folder: Path) -> Path:
    (folder / "more").mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:100]).encode()
    (folder / "a.jsonl").write_bytes(lines)
    junk = [bytes(JUNK) for _ in range(100)]
    table = pyarrow.table({"text": TEXTS[100:200], "junk": junk})
    pyarrow.parquet.write_table(
        table, folder / "b.parquet", row_group_size=25, compression="none", use_dictionary=False
    )
    (folder / "more" / "c.txt.gz").write_bytes(gzip.compress(TEXTS[200].encode()))
    cells = "text\n" + "".join(f'"{text}"\n' for text in TEXTS[201:300])
    (folder / "more" / "d.csv.zst").write_bytes(zstandard.compress(cells.encode()))
    (folder / "more" / "e.json").write_text(json.dumps([{"text": text} for text in TEXTS[300:]]))
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"no text")
    return folder


def upload(folder: Path, url: str) -> None:
    store = open_store(url)
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(path.relative_to(folder).as_posix(), path.read_bytes())


@pytest.fixture
def corpus(tmp_path, bucket, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "digests"))
    folder = write_corpus(tmp_path / "corpus")
    upload(folder, bucket)
    return folder


def found(*patterns: str, **settings) -> tuple[str, list[SourceFile], list[str]]:
    told: list[str] = []
    asked = Corpus(files=patterns, shard_bytes=SHARD, **settings)
    sources, _ = corpus_sources(asked, tell=told.append)
    decided = decided_corpus(asked, sources)
    rows_id = identify_rows(decided, sources, tokenizer="t", template=None)
    return rows_id, list(sources), [line for line in told if line.startswith("note: passed over")]


def documents(sources: list[SourceFile], shards: list[InputShard] | None = None) -> list:
    def refuse(place, problem):
        raise AssertionError(problem)

    shards = cut_shards(sources, shard_bytes=SHARD) if shards is None else shards
    return [
        (document.place, document.content)
        for shard in shards
        for document in read_documents(shard, sources, text_field="text", refuse=refuse)
    ]


@pytest.mark.parametrize(
    "pattern", ["*.jsonl", "*.parquet", "more/*", "", "**/[a-d].*", "more/c.txt.gz"]
)
def test_rows_and_documents_are_those_of_a_local_copy(corpus, bucket, pattern):
    here, local, passed_over = found(f"{corpus}/{pattern}")
    there, remote, passed_over_there = found(f"{bucket}/{pattern}")
    assert there == here
    assert [s.name for s in remote] == [s.name for s in local]
    assert documents(remote) == documents(local) != []
    assert passed_over_there == passed_over
    for source in remote:
        source.require_unchanged()


def test_groups_limits_and_kinds_work_in_a_bucket(corpus, bucket):
    def sources(root) -> list[tuple]:
        groups = (
            SourceGroup(files=(f"{root}/*.jsonl",), name="lines"),
            SourceGroup(files=(f"{root}/more",), max_bytes=1, name="more"),
        )
        files, _ = corpus_sources(Corpus(sources=groups))
        return [(file.name, file.sha256, file.group, file.kind) for file in files]

    assert sources(bucket) == sources(corpus)
    assert len(sources(bucket)) == 2


FILES = ("a.txt", "b.md", "x/a.txt", "x/y/a.txt", ".hidden/a.txt", ".c.txt", "x/.d/e.txt")


@pytest.mark.parametrize(
    "pattern",
    ["*.txt", "**/*.txt", "**", "**/**/a*", "*/a.txt", "**/[b]*", ".*", "no*", "**/.d/*", "*/**"],
)
def test_a_glob_means_there_what_it_means_here(tmp_path, pattern):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    here = matching_files(str(tmp_path / pattern), refuse=lambda path, why: None)
    there = [name for name in FILES if matches(name.split("/"), pattern.split("/"))]
    assert sorted(there) == sorted(match.name for match in here)


def test_a_file_is_hashed_once_and_a_changed_one_again(corpus, bucket, sent):
    first, _, _ = found(f"{bucket}/more/*.gz")
    assert sum(sent.pop("c.txt.gz")) == (corpus / "more" / "c.txt.gz").stat().st_size
    assert found(f"{bucket}/more/*.gz")[0] == first
    assert not sent
    open_store(bucket).put("more/c.txt.gz", gzip.compress(b"another text"))
    assert found(f"{bucket}/more/*.gz")[0] != first
    assert sent.pop("c.txt.gz")


def test_only_the_columns_and_row_groups_that_are_needed_are_read(corpus, bucket, sent):
    _, sources, _ = found(f"{bucket}/b.parquet")
    assert sources[0].bytes > 100 * JUNK
    second = cut_shards(sources, shard_bytes=25 * JUNK)[1:2]
    sent.clear()
    assert len(documents(sources, second)) == 25
    assert max(sent["b.parquet"]) == FOOTER
    assert sum(sent["b.parquet"]) < FOOTER + JUNK


def test_a_shard_of_lines_reads_little_more_than_its_bytes(tmp_path, bucket, sent):
    lines = b"".join(json.dumps({"text": "x" * 1000}).encode() + b"\n" for _ in range(4000))
    open_store(bucket).put("long.jsonl", lines)
    _, sources, _ = found(f"{bucket}/long.jsonl")
    sent.clear()
    shards = cut_shards(sources, shard_bytes=1 << 20)
    assert len(shards) == 4
    assert len(documents(sources, shards[1:2])) in range(1000, 1050)
    assert sum(sent["long.jsonl"]) < (1 << 20) + (1 << 17)


def test_a_file_that_changes_while_it_is_read_is_an_error_by_its_name(corpus, bucket):
    _, sources, _ = found(f"{bucket}/*.jsonl", on_error="skip")
    changed = (corpus / "a.jsonl").read_bytes().replace(b"says", b"said")
    open_store(bucket).put("a.jsonl", changed)
    with pytest.raises(RuntimeError, match=rf"{bucket}/a\.jsonl: changed while this run read it"):
        documents(sources)
    with pytest.raises(ValueError, match="changed while this run read it"):
        sources[0].require_unchanged()
    open_store(bucket).delete("a.jsonl")
    with pytest.raises(ValueError, match="is gone"):
        sources[0].require_unchanged()


def test_a_server_that_fails_is_never_taken_for_a_damaged_file(corpus, bucket, monkeypatch):
    _, sources, _ = found(f"{bucket}/*.[jp]*[lt]", f"{bucket}/more", on_error="skip")

    def failing(self, key, **kwargs):
        raise StoreError(f"{self.url}/{key}: the server is busy or failing (503)")

    monkeypatch.setattr(ObjectStore, "get", failing)
    assert len(sources) == 5
    for source in sources:
        with pytest.raises(RuntimeError, match="busy or failing"):
            documents([source])


@pytest.mark.parametrize(
    ("pattern", "error"),
    [
        ("s3://no-such-bucket/x/*", "no-such-bucket/x: there is no such bucket"),
        ("{bucket}/none/*.txt", "none/.* matches no file$"),
        ("{bucket}/none.txt", "none.txt' matches no file$"),
        ("{bucket}/*.png", "a picture, not text"),
        ("ftp://host/x", "'ftp://' is not supported here; supported: .*s3://, gs://, hf://"),
        ("hf://models/o/n", "expected hf://datasets/owner/name/PATH"),
        ("hf://datasets/o/n/../../x", "expected hf://datasets/owner/name/PATH"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_message(corpus, bucket, pattern, error):
    with pytest.raises((ValueError, OSError), match=error):
        corpus_sources(Corpus(files=(pattern.format(bucket=bucket),)))
