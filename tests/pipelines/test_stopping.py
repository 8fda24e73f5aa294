"""Ctrl-C and SIGTERM stop a command wherever they reach it."""

import signal
import time
import weakref

import pytest

from decant.pipelines.__main__ import COMMANDS, main


class Thing:
    pass


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_that_arrives_where_python_ignores_errors_is_not_lost(sent, monkeypatch, capsys):
    """In a weak reference's callback, of which a capture has thousands."""

    def command(_: list[str]) -> int:
        thing = Thing()
        reference = weakref.ref(thing, lambda _: signal.raise_signal(sent))
        del thing
        assert reference() is None
        for _ in range(200):
            time.sleep(0.01)
        return 0

    monkeypatch.setitem(COMMANDS, "precompute", command)
    assert main(["precompute"]) == 128 + sent
    assert "stopped" in capsys.readouterr().err
