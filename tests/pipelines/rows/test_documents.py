"""Reading documents from files, and the messages for documents that cannot be read."""

import gzip
import json
from pathlib import Path

import pytest

from decant.pipelines.rows import records
from decant.pipelines.rows.documents import Document, Place, read_documents
from decant.pipelines.rows.sources import SourceFile, cut_shards, find_sources


def find(tmp_path: Path, *patterns: str, max_bytes: int | None = None) -> list[SourceFile]:
    globs = [str(tmp_path / pattern) for pattern in patterns]
    return find_sources(globs, max_bytes=max_bytes, memory=tmp_path / "memory" / "digests.json")


def read(sources: list[SourceFile], *, shard_bytes: int = 1 << 20, field: str = "text"):
    """All documents, and all refusals as (offset, problem)."""
    refused: list[tuple[int, str]] = []
    documents: list[Document] = []
    for shard in cut_shards(sources, shard_bytes=shard_bytes):
        documents += read_documents(
            shard,
            sources,
            text_field=field,
            refuse=lambda place, problem: refused.append((place.offset, problem)),
        )
    return documents, refused


def test_a_text_file_is_a_document_and_so_is_a_json_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"text": "four"}\n')
    documents, refused = read(find(tmp_path, "*.*"))
    assert [document.content for document in documents] == ["one\ntwo", "three", "four"]
    assert [document.place for document in documents] == [Place(0, 0), Place(1, 0), Place(1, 19)]
    assert refused == []


def test_gzip_is_read_through(tmp_path):
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"body": "é"}\n{"body": "f"}')
    documents, _ = read(find(tmp_path, "b*"), field="body")
    assert [document.content for document in documents] == ["é", "f"]


@pytest.mark.parametrize("shard_bytes", [1, 7, 16, 17, 18, 50, 1000])
def test_cutting_a_file_anywhere_loses_and_repeats_no_line(tmp_path, shard_bytes):
    lines = [json.dumps({"text": "x" * (n % 13 + 1) + str(n)}) for n in range(40)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    documents, _ = read(find(tmp_path, "b*"), shard_bytes=shard_bytes)
    assert [document.content for document in documents] == [json.loads(s)["text"] for s in lines]


def test_what_is_not_utf8_is_named_with_its_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine \xff not")
    (tmp_path / "b.txt").write_text("fine")
    documents, refused = read(find(tmp_path, "*.txt"))
    assert [document.content for document in documents] == ["fine"]
    assert refused == [(0, "not UTF-8 at byte 5")]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "a"', "line 3: not valid JSON"),
        ('{"txt": "a"}', "line 3: no field 'text' (has: txt); set corpus.text_field"),
        ("[1]", "line 3: no field 'text' (has: list)"),
        ('{"text": 5}', "line 3: field 'text' is int, not a string"),
        ("[" * 100_000, "line 3: nested too deeply"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "line 3: an integer of more than 4,300 digits"),
        ('{"text": "a", "n": 9' + "}" * 100_000, "line 3: not valid JSON: Extra data"),
        ('{"x": 1, ' + '"y": 1, ' * 999 + '"z": 1}', "line 3: no field 'text' (has: x, y, z)"),
        ("{" + ", ".join(f'"k{n}": 1' for n in range(9999)) + "}", "k9, k10"),
        ('{"text": "\\ud800"}', "line 3: half of a surrogate pair at character 0"),
        ("\ufeff{}", "line 3: not valid JSON: Unexpected UTF-8 BOM"),
    ],
)
def test_a_bad_line_is_named_by_number_and_the_rest_is_read(tmp_path, line, problem):
    good = '{"text": "a"}'
    (tmp_path / "b.jsonl").write_text("\n".join([good, "", line, good]))
    documents, refused = read(find(tmp_path, "b*"))
    assert len(documents) == 2
    assert len(refused) == 1
    assert problem in refused[0][1]
    assert len(refused[0][1]) < 500


@pytest.mark.parametrize("shard_bytes", [1, 40, 64, 65, 1000])
def test_a_bad_line_has_its_number_in_the_file_wherever_the_file_is_cut(tmp_path, shard_bytes):
    lines = ['{"text": "a"}', "", "{bad", "x" * 50] * 9
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    _, refused = read(find(tmp_path, "b*"), shard_bytes=shard_bytes)
    numbers = [int(problem.removeprefix("line ").partition(":")[0]) for _, problem in refused]
    assert numbers == [n for n in range(1, 37) if n % 4 in (3, 0)]


def test_the_lines_before_a_span_are_counted_once(tmp_path, monkeypatch):
    """2,000 bad lines took 2.1 s, most of it for reading what was before each of them."""
    (tmp_path / "b.jsonl").write_text("{bad}\n" * 500)
    sources = find(tmp_path, "b*")
    opened = []
    monkeypatch.setattr(records, "_open", lambda source, _open=records._open, **more: (
        opened.append(source), _open(source, **more))[1])  # fmt: skip
    _, refused = read(sources, shard_bytes=2000)
    assert len(refused) == 500
    assert len(opened) == 2 + 1  # for the lines before the second span


def test_numbers_that_json_does_not_have_and_repeated_keys_are_read_as_python_reads_them(tmp_path):
    line = '{"text": "a", "text": "b", "score": NaN, "other": -Infinity, "big": 1e999}'
    (tmp_path / "b.jsonl").write_text(line)
    documents, refused = read(find(tmp_path, "b*"))
    assert [document.content for document in documents] == ["b"]
    assert refused == []


@pytest.mark.parametrize("suffix", ["", ".gz", ".GZ"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    def write(name: str, text: str) -> None:
        data = b"\xef\xbb\xbf" + text.encode()
        (tmp_path / (name + suffix)).write_bytes(gzip.compress(data) if suffix else data)

    write("a.txt", "one\ufeff")
    write("b.jsonl", '{"text": "two"}\n{"text": "\ufeffthree"}')
    write("c.JSONL", '{"text": "four"}')
    write("d.txt", "")
    documents, refused = read(find(tmp_path, "*.*"))
    assert refused == []
    assert [d.content for d in documents] == ["one\ufeff", "two", "\ufeffthree", "four"]
    assert [d.place.offset for d in documents[1:3]] == [0, 19]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_utf16_is_told_once_a_file(tmp_path, encoding):
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_bytes(mark + ('{"text": "é"}\n' * 3).encode(encoding))
    documents, refused = read(find(tmp_path, "*.*"))
    assert documents == []
    assert refused == [(0, "UTF-16 or UTF-32, not UTF-8; convert the file")] * 2


def test_a_glob_that_matches_nothing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\*.*matches no file"):
        find(tmp_path, "nothing*")


def test_a_corpus_of_empty_files_is_refused(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="every matching file is empty"):
        find(tmp_path, "*.txt")


def test_names_do_not_depend_on_where_the_corpus_lies_nor_on_the_order_of_globs(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place / "sub").mkdir(parents=True)
        (tmp_path / place / "sub" / "a.txt").write_text("a")
        (tmp_path / place / "b.txt").write_text("b")
    here = find(tmp_path, "here/**/*.txt", "here/*.txt")
    there = find(tmp_path, "there/*.txt", "there/**/*.txt")
    names = [(source.name, source.sha256) for source in here]
    assert names == [(source.name, source.sha256) for source in there]
    assert [name for name, _ in names] == ["b.txt", "sub/a.txt"]


def test_a_file_that_changes_size_during_a_run_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    sources = find(tmp_path, "*.txt")
    (tmp_path / "a.txt").write_text("ab")
    with pytest.raises(ValueError, match=r"a\.txt: had 1 bytes when this run began, now 2"):
        read(sources)


def test_a_share_of_a_corpus_is_the_same_share_every_time(tmp_path):
    for n in range(20):
        (tmp_path / f"{n}.txt").write_text("x" * 10)
    some = find(tmp_path, "*.txt", max_bytes=45)
    assert len(some) == 5
    assert some == find(tmp_path, "*.txt", max_bytes=45)
    assert set(some) < set(find(tmp_path, "*.txt", max_bytes=100))
