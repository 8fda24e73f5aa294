"""Reading Parquet and compressed files, and the messages about damaged ones."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from decant.pipelines.rows.documents import (
    Chat,
    Completion,
    Document,
    Place,
    read_documents,
    with_kinds,
)
from decant.pipelines.rows.sources import SourceFile, cut_shards, find_sources
from tests.making.chats import dialogue

TEXTS = [f"text {n} " + "é🙂x" * (n % 7) for n in range(300)]


def find(tmp_path: Path, *patterns: str, field: str = "text") -> list[SourceFile]:
    globs = [str(tmp_path / pattern) for pattern in patterns]
    memory = tmp_path / "memory" / "digests.json"
    return with_kinds(find_sources(globs, max_bytes=None, memory=memory), text_field=field)


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


def contents(tmp_path: Path, pattern: str, **options):
    documents, refused = read(find(tmp_path, pattern), **options)
    assert refused == []
    return [document.content for document in documents]


def write_table(path: Path, columns: dict, *, rows: int = 40, **options) -> None:
    pq.write_table(pa.table(columns), path, row_group_size=rows, **options)


def jsonl(records) -> bytes:
    return "\n".join(json.dumps(record) for record in records).encode()


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    half = len(data) // 2  # two frames, as parallel compressors write them
    packer = zstandard.ZstdCompressor(write_checksum=True)
    return packer.compress(data[:half]) + packer.compress(data[half:])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_read_through(tmp_path, suffix):
    data = jsonl({"text": text} for text in TEXTS)
    (tmp_path / f"b.jsonl{suffix}").write_bytes(compressed(data, suffix))
    (tmp_path / f"c.txt{suffix}").write_bytes(compressed(data, suffix))
    (tmp_path / f"d.jsonl{suffix}").write_bytes(b"")
    (tmp_path / "plain.jsonl").write_bytes(data)
    assert contents(tmp_path, "b*") == TEXTS
    assert contents(tmp_path, "c*") == [data.decode()]
    assert contents(tmp_path, "[bd]*") == TEXTS
    packed, plain = (read(find(tmp_path, name))[0] for name in ("b*", "plain*"))
    assert [d.place.offset for d in packed] == [d.place.offset for d in plain]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kept", [0.3, 0.7, -1])
def test_a_compressed_file_that_is_cut_short_is_told_and_gives_whole_lines_only(
    tmp_path, suffix, kept
):
    data = jsonl({"text": text} for text in TEXTS)
    whole = compressed(data, suffix)
    cut = whole[: int(len(whole) * kept) if kept > 0 else kept]
    (tmp_path / f"b.jsonl{suffix}").write_bytes(cut)
    (tmp_path / f"c.txt{suffix}").write_bytes(cut)
    documents, refused = read(find(tmp_path, "b*"))
    texts = [document.content for document in documents]
    assert texts == TEXTS[: len(texts)]
    ((offset, problem),) = refused
    assert f"damaged or cut short after {offset} bytes of text, the rest is lost" in problem
    assert offset == len(jsonl({"text": text} for text in texts)) + bool(texts)
    documents, refused = read(find(tmp_path, "c*"))
    assert documents == []
    assert "damaged or cut short, cannot be decompressed" in refused[0][1]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_altered_and_foreign_bytes_are_told(tmp_path, suffix):
    whole = bytearray(compressed(jsonl({"text": text} for text in TEXTS), suffix))
    whole[len(whole) // 2] ^= 255
    for name, data in (("altered", whole), ("other", b"text")):
        path = tmp_path / f"{name}.jsonl{suffix}"
        path.write_bytes(data)
        _, refused = read(find(tmp_path, f"{name}*"))
        # gzip checks at the end of the file, so a damaged line may be refused before.
        assert "damaged or cut short" in refused[-1][1]


def test_a_table_gives_a_document_a_record_whatever_else_it_holds(tmp_path):
    write_table(tmp_path / "a.parquet", {"id": list(range(300)), "text": TEXTS})
    assert contents(tmp_path, "a*") == TEXTS
    write_table(tmp_path / "b.parquet", {"body": pa.array(TEXTS).dictionary_encode()})
    assert contents(tmp_path, "b*", field="body") == TEXTS


@pytest.mark.parametrize("shard_bytes", [0, -1])
def test_shards_of_no_bytes_are_refused_and_drop_no_document(tmp_path, shard_bytes):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(ValueError, match=r"corpus.shard_bytes is .*; expected 1 or more"):
        cut_shards(find(tmp_path, "a*"), shard_bytes=shard_bytes)


@pytest.mark.parametrize("shard_bytes", [1, 100, 1000, 3000, 10**6])
def test_cutting_a_table_anywhere_loses_and_repeats_no_record(tmp_path, shard_bytes):
    write_table(tmp_path / "a.parquet", {"text": TEXTS, "id": list(range(300))}, rows=17)
    sources = find(tmp_path, "a*")
    documents, _ = read(sources, shard_bytes=shard_bytes)
    assert [document.content for document in documents] == TEXTS
    assert [document.place for document in documents] == [Place(0, n) for n in range(300)]
    if shard_bytes == 1000:
        shards = cut_shards(sources, shard_bytes=shard_bytes)
        shares = [len(read_shard(shard, sources)) for shard in shards]
        assert sum(share > 0 for share in shares) > 2


def read_shard(shard, sources):
    return list(read_documents(shard, sources, text_field="text", refuse=lambda *_: None))


def test_only_the_columns_that_are_needed_are_read(tmp_path):
    """The other columns are damaged, and it does not matter."""
    junk = [f"{n:0200d}" for n in range(300)]
    columns = {"text": TEXTS, "junk": junk}
    write_table(tmp_path / "a.parquet", columns, use_dictionary=False, compression="none")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    at = data.index(junk[150].encode())
    data[at : at + 60] = b"\xff" * 60
    (tmp_path / "a.parquet").write_bytes(data)
    assert contents(tmp_path, "a*") == TEXTS


def test_a_field_that_is_not_utf8_is_one_record_s_problem(tmp_path):
    texts = pa.array([b"a", b"b\xff", b"c"]).view(pa.string())
    write_table(tmp_path / "a.parquet", {"text": texts})
    documents, refused = read(find(tmp_path, "a*"))
    assert [document.content for document in documents] == ["a", "c"]
    assert refused == [(1, "record 2: not UTF-8 at byte 1 of the field")]


def test_what_is_wrong_with_a_table_is_told_once(tmp_path):
    path = tmp_path / "a.parquet"
    write_table(path, {"body": TEXTS, "id": list(range(300))}, rows=50)
    _, refused = read(find(tmp_path, "a*"), shard_bytes=100)
    ((_, problem),) = refused
    assert problem.startswith("no field 'text' (has: body, id); set corpus.text_field")
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"PAR1", b"text"):
        path.write_bytes(damaged)
        documents, refused = read(find(tmp_path, "a*"), shard_bytes=100, field="body")
        assert documents == []
        assert len(refused) == 1
        assert "damaged, cut short or no Parquet file" in refused[0][1]


def test_a_row_group_that_is_damaged_is_told_and_the_others_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    write_table(path, {"text": TEXTS}, rows=100, write_page_checksum=True, compression="none")
    data = bytearray(path.read_bytes())
    at = data.index(TEXTS[150].encode())
    data[at : at + 4] = b"gone"
    path.write_bytes(data)
    documents, refused = read(find(tmp_path, "a*"))
    assert [document.content for document in documents] == TEXTS[:100] + TEXTS[200:]
    ((offset, problem),) = refused
    assert offset == 100
    assert problem.startswith("record 101: damaged, the rest of its row group is lost")


def test_chats_and_completions_are_known_by_their_fields(tmp_path):
    talk = dialogue("Hi", "Yes")
    parts = {"role": "user", "content": [{"type": "text", "text": "H"}, "i"]}
    records = {
        "a": {"messages": talk, "id": 3},
        "b": {"prompt": "Hi", "completion": "Yes"},
        "c": {"prompt": talk[:1], "completion": talk[1:], "tools": [{"name": "f"}]},
        "d": {"messages": [parts, talk[1]]},
        "e": {"text": talk, "messages": "no"},
    }
    for name, record in records.items():
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([record]))
    sources = find(tmp_path, "*.jsonl")
    assert [source.kind for source in sources] == ["chat", "completion", "chat", "chat", "chat"]
    documents = contents(tmp_path, "*.jsonl")
    chat = Chat(tuple(talk))
    tools = [{"name": "f"}]
    assert documents == [chat, Completion("Hi", "Yes"), Chat(tuple(talk), tools, 1), chat, chat]


def test_chats_in_a_table_have_no_keys_without_a_value(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": ["f"]}
    talks = [dialogue("Hi", "Yes", "No", "Why"), [*dialogue("Hi"), call]]
    write_table(tmp_path / "a.parquet", {"messages": talks, "junk": [1, 2]})
    first, second = contents(tmp_path, "a*")
    assert first == Chat(tuple(talks[0]))
    assert second.messages[1] == call | {"content": ""}


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"text": "x"}, "this record is a text, but the file's first is a chat; put records"),
        ({"messages": dialogue("Hi")}, "no message with the role 'assistant'"),
        ({"messages": []}, "no message with the role 'assistant'"),
        ({"messages": "Hi"}, "field 'messages' is a string, not a list of messages"),
        ({"messages": None}, "field 'messages' is NoneType, not a string or a list"),
        ({"messages": [{"from": "x", "value": "y"}]}, "needs 'role' and 'content'; got: from, v"),
        ({"messages": ["Hi"]}, "needs 'role' and 'content'; got: str"),
        ({"messages": [{"role": "user", "content": 5}]}, "content is int, not a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "a message's content has a part of type 'image'; teachers read text only",
        ),
        ({"messages": [{"role": "user", "content": [5]}]}, "parts that are not text"),
        (
            {"messages": dialogue("Look", "Yes"), "images": [{"path": "a.png"}]},
            "field 'images' is not empty; teachers read text only",
        ),
        ({"messages": dialogue("\ud800", "Yes")}, "cannot be written as JSON"),
        ({"messages": dialogue("Hi", "Yes"), "tools": {}}, "field 'tools' is dict, not a list"),
        ({"prompt": "x", "completion": []}, "one is a string, the other a list"),
        ({"completion": "x"}, "no field 'text' (has: completion); set corpus.text_field, or have"),
    ],
)
def test_a_record_that_is_no_chat_is_named_by_its_line_and_why(tmp_path, record, problem):
    good = {"messages": dialogue("Hi", "Yes")}
    (tmp_path / "b.jsonl").write_bytes(jsonl([good, record, good]))
    documents, refused = read(find(tmp_path, "b*"))
    assert len(documents) == 2
    assert refused[0][1].startswith("line 2: ")
    assert problem in refused[0][1]


def test_half_a_surrogate_is_no_text(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"text": "ab\ud800"}]))
    assert read(find(tmp_path, "b*"))[1] == [(0, "line 1: half of a surrogate pair at character 2")]


def test_equal_texts_that_teach_other_tokens_are_no_duplicates():
    place = Place(0, 0)
    contents = ["ab", Completion("a", "b"), Completion("", "ab"), Chat(tuple(dialogue("a", "b")))]
    contents.append(Chat(tuple(dialogue("a", "b")), first=1))
    assert len({Document(place, content).content_hash for content in contents}) == 5
