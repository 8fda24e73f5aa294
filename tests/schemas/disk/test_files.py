"""Files are written atomically; damaged files are refused."""

import json

import pytest

from decant.schemas.disk import record_file
from decant.schemas.disk.array_record import RecordReaders, write_records
from decant.schemas.disk.atomic import read_json, replacing, write_json
from decant.schemas.disk.record_file import RecordFile
from tests.open_files import is_open


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail_midway() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_midway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_records_are_read_in_the_order_asked_for(tmp_path):
    path = tmp_path / "file"
    entry = write_records(path, [b"a", b"", b"c" * 70_000])
    assert entry.records == 3
    assert entry.bytes == path.stat().st_size
    read = RecordReaders().read(path, [2, 0, 1, 2], expected=entry)
    assert read == [b"c" * 70_000, b"a", b"", b"c" * 70_000]


def test_the_same_records_give_the_same_bytes(tmp_path):
    records = [b"x" * n for n in range(50)]
    assert write_records(tmp_path / "a", records) == write_records(tmp_path / "b", records)


def test_more_files_than_descriptors_can_be_read(tmp_path):
    entries = [write_records(tmp_path / str(n), [bytes([n])]) for n in range(12)]
    readers = RecordReaders(capacity=3)
    for _ in range(2):
        for n, entry in enumerate(entries):
            assert readers.read(tmp_path / str(n), [0], expected=entry) == [bytes([n])]
    assert len(readers._open) == 3


def test_the_index_of_a_file_is_read_once_and_after_it_was_forgotten_again(tmp_path, monkeypatch):
    entries = [write_records(tmp_path / str(n), [bytes([n])] * 40) for n in range(4)]
    read, plain = [], RecordFile._read_index

    def counting(self, size):
        read.append(self)
        return plain(self, size)

    monkeypatch.setattr(RecordFile, "_read_index", counting)
    readers = RecordReaders(capacity=1)
    for _ in range(3):
        for n, entry in enumerate(entries):
            assert readers.read(tmp_path / str(n), [39], expected=entry) == [bytes([n])]
    assert len(read) == 4
    readers.forget(tmp_path / "0", entries[0])
    readers.read(tmp_path / "0", [0], expected=entries[0])
    assert len(read) == 5


def test_indexes_take_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("decant.schemas.disk.array_record._MOST_INDEX_BYTES", 8 * 41 * 2)
    entries = [write_records(tmp_path / str(n), [bytes([n])] * 40) for n in range(4)]
    readers = RecordReaders(capacity=1)
    for n in (0, 1, 2, 3, 0):
        assert readers.read(tmp_path / str(n), [39], expected=entries[n]) == [bytes([n])]
    assert [path.name for path in readers._indexes] == ["3", "0"]
    assert readers._index_bytes == 8 * 41 * 2


def test_a_missing_and_a_truncated_file_are_named(tmp_path):
    path = tmp_path / "file"
    entry = write_records(path, [b"x" * 1000] * 300)
    path.write_bytes(path.read_bytes()[:-70_000])
    with pytest.raises(ValueError, match=r"file: expected \d+ bytes"):
        RecordReaders().read(path, [0], expected=entry)
    path.unlink()
    with pytest.raises(ValueError, match="missing"):
        RecordReaders().read(path, [0], expected=entry)


def test_edited_json_is_refused(tmp_path):
    path = tmp_path / "commit.json"
    write_json(path, {"rows": 3})
    assert read_json(path) == {"rows": 3}
    edited = json.loads(path.read_text()) | {"rows": 4}
    path.write_text(json.dumps(edited))
    with pytest.raises(ValueError, match="checksum mismatch"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"commit\.json: damaged"):
        read_json(path)


def test_another_json_file_under_the_name_is_refused(tmp_path):
    write_json(tmp_path / "evaluation.json", {"steps": 3})
    assert read_json(tmp_path / "evaluation.json", holds="steps") == {"steps": 3}
    with pytest.raises(ValueError, match="without 'rows', so it is another file under this name"):
        read_json(tmp_path / "evaluation.json", holds="rows")


def test_an_open_file_is_closed_when_the_interpreter_has_dropped_its_modules(tmp_path, monkeypatch):
    """As at the end of a script that holds a cache; an error in `__del__` fails a test."""
    write_records(tmp_path / "file", [b"a"])
    file = RecordFile(tmp_path / "file")
    assert is_open(tmp_path / "file")
    monkeypatch.setattr(record_file, "os", None)
    del file
    assert not is_open(tmp_path / "file")
