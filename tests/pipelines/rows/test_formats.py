"""Formats of corpus files: CSV and JSON are read, what is no text is refused, folders are read."""

import dataclasses
import gzip
import json
import time

import pytest

from decant.pipelines.capture.step_inputs import corpus_sources
from decant.pipelines.config import Corpus, SourceGroup
from decant.pipelines.rows import json_values as json_module
from decant.pipelines.rows import records
from decant.pipelines.rows.documents import Completion, read_documents, with_kinds
from decant.pipelines.rows.json_values import json_values
from decant.pipelines.rows.rules import row_rules
from decant.pipelines.rows.sources import cut_shards, find_sources


def read(folder, *, problems=None, text_field="text", groups=None):
    """The contents of all documents below `folder`, in order."""
    groups = groups or [f"{folder}/*"]
    sources = find_sources(groups, max_bytes=None, memory=folder.parent / "memory.json")
    sources = with_kinds(sources, text_field=text_field)

    def refuse(_, problem):
        assert problems is not None, problem
        problems.append(problem)

    return [
        document.content
        for shard in cut_shards(sources, shard_bytes=1 << 20)
        for document in read_documents(shard, sources, text_field=text_field, refuse=refuse)
    ]


RECORDS = [{"text": "one, ünd"}, {"text": 'tw"o\nlines', "n": 12}, {"text": "three {]"}]
TEXTS = [record["text"] for record in RECORDS]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=4, ensure_ascii=False),
        "\n".join(map(json.dumps, RECORDS)),
        "\ufeff \n" + json.dumps(RECORDS[0]) + json.dumps(RECORDS[1:])[1:-1].replace("}, ", "} "),
    ],
)
def test_a_json_file_is_an_array_of_records_or_one_after_the_other(tmp_path, text):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.json").write_text(text)
    (tmp_path / "c" / "b.json.gz").write_bytes(gzip.compress(text.encode()))
    assert read(tmp_path / "c") == TEXTS * 2


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_json_values_do_not_depend_on_where_the_text_is_cut(size):
    values = [*RECORDS, 12, 345.5e3, "a", None, [[1, {"b": []}]], -1]
    text = json.dumps(values, indent=1)
    assert list(json_values(text[at : at + size] for at in range(0, len(text), size))) == values
    for cut in range(1, len(text)):
        with pytest.raises(ValueError, match=r"cut short|not valid JSON"):
            list(json_values(iter([text[:cut]])))


def test_a_bad_record_of_a_long_json_file_is_told_at_once():
    served = []

    def chunks():
        yield '[{"text": "a"}, {"text" "b"}, '
        for number in range(10_000):
            served.append(number)
            yield '{"text": "' + "c" * 1000 + '"}, '

    values = json_values(chunks())
    assert next(values) == {"text": "a"}
    with pytest.raises(ValueError, match="Expecting ':'"):
        next(values)
    assert len(served) < 10


def test_a_csv_file_has_a_header_and_cells_with_newlines(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.csv").write_text(
        '\ufeffid,text\r\n1,"one, ünd"\r\n\r\n2,"tw""o\nlines"\n3,three {]', newline=""
    )
    (tmp_path / "c" / "b.csv").write_text("completion,id,prompt\nyes,1,really?\n")
    assert read(tmp_path / "c") == [*TEXTS, Completion("really?", "yes")]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("id,body\n1,a\n", "no field 'text' (has: id, body)"),
        ("id,text\n1,a\n2\n3,c\n", "record 2: 1 cells, but the header has 2"),
        ('id,text\n1,a\n2,"b', "unexpected end of data; the rest of the file is lost"),
        (b"text\na\n\xff\n", "not UTF-8 at byte"),
    ],
)
def test_a_bad_csv_file_is_told_by_its_place(tmp_path, text, problem):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    problems = []
    read(tmp_path / "c", problems=problems)
    (only,) = problems
    assert problem in only


def test_a_long_csv_file_is_read_a_record_at_a_time(tmp_path):
    (tmp_path / "c").mkdir()
    with (tmp_path / "c" / "a.csv").open("w") as file:
        file.write("text\n")
        file.writelines(f'"{n} {"long " * 200}\nline"\n' for n in range(20_000))
    began = time.monotonic()
    assert len(read(tmp_path / "c")) == 20_000
    assert time.monotonic() - began < 60


def test_what_one_record_may_take_of_the_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_BLOCK", 100)
    monkeypatch.setattr(records, "_LONGEST_CELL", 1000)
    monkeypatch.setattr(json_module, "LONGEST", 1000)
    (tmp_path / "c").mkdir()
    long = "long " * 2000
    (tmp_path / "c" / "a.csv").write_text(f"text\none\n{long}\n")
    (tmp_path / "c" / "b.json").write_text(json.dumps([{"text": "two"}, {"text": long}]))
    problems = []
    assert read(tmp_path / "c", problems=problems) == ["one", "two"]
    line, record = problems
    assert "a line of more than 1,000 characters; the rest of the file is lost" in line
    assert "a record of more than 1,000 characters" in record


@pytest.mark.parametrize(
    "name", ["a.tsv", "a.PDF", "a.docx", "a.zip", "a.tar.gz", "a.png", "a.npz"]
)
def test_a_file_that_is_no_text_is_refused_by_name(tmp_path, name):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / name).write_bytes(b"plain")
    with pytest.raises(ValueError, match=rf"{name}: .*kind = \"text\" in corpus.sources"):
        read(tmp_path / "c")
    if not name.endswith("gz"):
        group = SourceGroup(files=(f"{tmp_path}/c/*",), kind="text")
        assert read(tmp_path / "c", groups=[group]) == ["plain"]


def test_texts_of_any_other_suffix_stay_texts(tmp_path):
    (tmp_path / "c").mkdir()
    names = ["a.md", "b.rst", "c.py", "d.html", "e.txt", "f", "g.v2", "h.xml"]
    for name in names:
        (tmp_path / "c" / name).write_text(name)
    assert read(tmp_path / "c") == names


def test_a_folder_stands_for_the_readable_files_below_it(tmp_path):
    root = tmp_path / "c[1]"
    for name in ("a.txt", "d/b.jsonl", ".git/x.txt", "d/.hidden", "d/p.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"text": "b"}' if name.endswith("jsonl") else name)
    told = []
    sources, skipped = corpus_sources(Corpus(files=(str(root),)), tell=told.append)
    assert [source.name for source in sources] == ["a.txt", "d/b.jsonl"]
    assert not skipped
    (line,) = told
    assert all(name in line for name in (".git", "d/.hidden", "d/p.png"))
    with pytest.raises(FileNotFoundError, match="matches no file"):
        corpus_sources(
            Corpus(files=(str(root / ".git" / ".."),) if False else (str(tmp_path / "n"),))
        )


def test_groups_have_their_own_field_kind_and_size(tmp_path):
    for name, text in (
        ("a.txt", '{"body": "a"}'),
        ("b.jsonl", '{"text": "b"}'),
        ("c.txt", "c" * 9),
    ):
        (tmp_path / name).write_text(text)
    (tmp_path / "d.txt").write_text("d" * 9)
    groups = (
        SourceGroup(files=(f"{tmp_path}/b.jsonl",)),
        SourceGroup(files=(f"{tmp_path}/a.txt",), text_field="body", kind="jsonl"),
        SourceGroup(files=(f"{tmp_path}/[cd].txt",), max_bytes=5),
    )
    corpus = Corpus(sources=groups)
    sources, _ = corpus_sources(corpus)
    shards = cut_shards(sources, shard_bytes=1 << 20)
    assert [[span.source for span in shard.spans] for shard in shards] == [[0], [1], [2]]
    contents = [
        document.content
        for shard in shards
        for document in read_documents(shard, sources, text_field="text", refuse=pytest.fail)
    ]
    assert contents[:2] == ["b", "a"]
    assert contents[2] in ("c" * 9, "d" * 9)
    both = dataclasses.replace(corpus, files=("x",))
    with pytest.raises(ValueError, match=r"corpus.files and \[\[corpus.sources\]\] both"):
        corpus_sources(both)


def test_rules_change_only_for_files_that_are_read_otherwise_than_before(tmp_path):
    for name in ("a.txt", "b.jsonl", "c.csv"):
        (tmp_path / name).write_text('{"text": "b"}' if name == "b.jsonl" else "text\na")

    def rules(*groups):
        corpus = Corpus(sources=groups, heldout=0.1, shard_bytes=1 << 20)
        return row_rules(corpus, corpus_sources(corpus)[0])

    plain = rules(SourceGroup(files=(f"{tmp_path}/a.txt", f"{tmp_path}/b.jsonl")))
    assert not plain.keys() & {"formats", "text_fields", "groups"}
    assert plain == rules(SourceGroup(files=(f"{tmp_path}/c.csv",), kind="text"))
    table = rules(SourceGroup(files=(f"{tmp_path}/c.csv",)))
    assert table["formats"] == [("c.csv", "csv")]
    other = rules(SourceGroup(files=(f"{tmp_path}/b.jsonl",), text_field="text"))
    assert other["text_fields"] == [("b.jsonl", "text")]
