"""`ReadAhead` gives each file's bytes or error, and has few of them under way."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from decant.pipelines.upkeep.read_ahead import ReadAhead


def test_files_come_as_asked_for_whatever_the_order_and_several_are_read_at_once():
    together = threading.Barrier(4)
    asked: list[str] = []

    def read(key: str) -> bytes:
        asked.append(key)
        if key in order[:4]:
            together.wait(timeout=10)  # the first four wait for each other
        if key == "7":
            raise FileNotFoundError(key)
        return key.encode()

    order = [str(number) for number in range(300)]
    with ThreadPoolExecutor(4) as pool:
        ahead = ReadAhead(read, order, pool)
        assert ahead("0") == b"0"
        assert len(asked) <= 64
        assert ahead("other") == b"other"
        with pytest.raises(FileNotFoundError, match="7"):
            ahead("7")
        assert [ahead(key) for key in order[1:7]] == [key.encode() for key in order[1:7]]
        assert [ahead(key) for key in order[8:]] == [key.encode() for key in order[8:]]
    assert sorted(asked) == sorted([*order, "other"]), "each was read once"
