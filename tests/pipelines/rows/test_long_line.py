"""A long line of JSON lines has the value that it has when it is parsed at once."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from decant.pipelines.rows import long_line, records
from decant.pipelines.rows.documents import Completion, read_documents, with_kinds
from decant.pipelines.rows.long_line import LongLine
from decant.pipelines.rows.long_text import LongText
from decant.pipelines.rows.sources import cut_shards, find_sources


@pytest.fixture(autouse=True, scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_line, "_KEPT", 8)
        patch.setattr(long_line, "BLOCK", 13)
        yield


def whole(value: Any) -> Any:
    """The value with its long texts read; ValueError if one holds half of a surrogate pair."""
    if isinstance(value, dict):
        return {
            key: "".join(item.chunks()) if isinstance(item, LongText) else item
            for key, item in value.items()
        }
    return value


def parsed(line: bytes, *, block: int) -> Any:
    long = LongLine(line[i : i + block] for i in range(0, len(line), block))
    assert len(long) == len(line)
    return whole(long.value())


TEXT = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(["\\", '"', "\n", "🙂", "é", "u", "ab", "\\u0041", "\0"])).map(
        "".join
    ),
)
VALUES = st.recursive(
    st.none() | st.integers() | TEXT,
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=5), inside),
    max_leaves=8,
)


@settings(deadline=None)
@given(value=st.dictionaries(TEXT, VALUES) | VALUES, ascii=st.booleans(), block=st.integers(1, 40))
@example(value={"text": "🙂" * 20}, ascii=True, block=7)
@example(value={"text": "\\" * 41 + '"'}, ascii=False, block=1)
def test_it_has_the_same_value(value, ascii, block):
    line = json.dumps(value, ensure_ascii=ascii).encode()
    assert parsed(line, block=block) == value


@settings(deadline=None, max_examples=300)
@given(text=TEXT, at=st.integers(0, 10_000), byte=st.integers(0, 255), block=st.integers(1, 40))
def test_a_wrong_byte_is_an_error_in_both_or_in_neither(text, at, byte, block):
    line = bytearray(json.dumps({"a": text, "b": 1}, ensure_ascii=at % 2 == 0).encode())
    line[at % len(line)] = byte
    try:
        expected = json.loads(line.decode())
        json.dumps(expected, ensure_ascii=False).encode()
    except ValueError:
        with pytest.raises(ValueError, match=r"."):
            json.dumps(parsed(bytes(line), block=block), ensure_ascii=False).encode()
    else:
        assert parsed(bytes(line), block=block) == expected


def read(path: Path, **options: Any):
    sources = find_sources([str(path)], max_bytes=None, memory=path.parent / "memory")
    sources, refused = with_kinds(sources, text_field="text"), []
    documents = [
        document
        for shard in cut_shards(sources, shard_bytes=50)
        for document in read_documents(
            shard, sources, text_field="text", refuse=lambda _, why: refused.append(why)
        )
    ]
    return documents, refused


RECORDS = [
    {"text": "short"},
    {"id": 1, "text": 'a long one, with "quotes" and \\ and 🙂' * 9},
    {"id": ["other long text" * 20], "text": "short again"},
    {"text": "\ud83d" + "x" * 300},
    {"no": "x" * 300},
    {"text": "\ud83d\ude00 and the last" * 30},
]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_long_lines_among_others_are_read_in_their_places(tmp_path, monkeypatch, suffix):
    lines = "\n".join(json.dumps(record, ensure_ascii=True) for record in RECORDS)
    data = b"\xef\xbb\xbf" + lines.encode()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(gzip.compress(data) if suffix else data)
    short, refused = read(path)
    assert len(refused) == 2
    assert len(short) == 4
    monkeypatch.setattr(records, "LONG", 40)
    long, long_refused = read(path)
    assert long_refused == refused
    assert [d.place for d in long] == [d.place for d in short]
    assert [d.content_hash for d in long] == [d.content_hash for d in short]
    assert [isinstance(d.content, LongText) for d in long] == [False, True, True, True]
    texts = ["".join(d.content.chunks()) for d in long if isinstance(d.content, LongText)]
    assert texts == [d.content for d in short[1:]]


def test_a_long_completion_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONG", 40)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 99, "completion": "y"}))
    (document,), _ = read(path)
    assert document.content == Completion("x" * 99, "y")
