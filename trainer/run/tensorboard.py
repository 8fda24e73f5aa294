"""Metrics as TensorBoard event files, `events.out.tfevents.…` in the run's directory.

The events are tensorboardX's messages, but its `SummaryWriter` is not used: it writes from a
thread, through a queue of pickles, up to two minutes late, so a kill would lose events. Here an
event has reached the operating system when `add` returns.

Every process that continues a run begins a file of its own, with a session-start event at the step
that it continues from. TensorBoard then hides older events from that step on.
"""

from __future__ import annotations

import math
import struct
import time
from pathlib import Path
from typing import Any, BinaryIO

PREFIX = "events.out.tfevents"
GROUPS = {"heldout_": "heldout/"}
"""Metric prefixes and the groups they are shown in; all other metrics are in `train/`."""


class EventFile:
    """The event file of one process; it is created with its first event."""

    def __init__(self, run: Path, *, after: int | None):
        """`after`: the step of the checkpoint that the run continues from; None for a new run."""
        self._run, self._after = run, after
        self._file: BinaryIO | None = None

    def add(self, metrics: dict[str, Any]) -> None:
        """Write one line of metrics as an event at `metrics["step"]`."""
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

        values = [
            Summary.Value(tag=_tag(name), simple_value=float(value))
            for name, value in metrics.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        ]
        file = self._file = self._file or self._begin()
        _write(file, step=metrics["step"], summary=Summary(value=values))

    def close(self) -> None:
        """Finish the file."""
        if self._file is not None:
            self._file.close()

    def _begin(self) -> BinaryIO:
        from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore

        # TensorBoard reads a run's files in the order of their names.
        number = len(list(self._run.glob(f"{PREFIX}.*")))
        file = (self._run / f"{PREFIX}.{int(time.time())}.{number:05d}").open("xb")
        _write(file, file_version="brain.Event:2")
        if number:
            begins = 0 if self._after is None else self._after + 1
            _write(file, step=begins, session_log=SessionLog(status=SessionLog.START))
        return file


def _write(file: BinaryIO, **fields: Any) -> None:
    """Write an event as a TFRecord: its length and its bytes, each with a checksum."""
    # Imported here, because it takes half a second that --help and other commands do not need.
    # Pyright sees no names, because protobuf makes the classes at run time.
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore
    from tensorboardX.record_writer import masked_crc32c

    data = Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(data))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    file.write(length + sums[0] + data + sums[1])
    file.flush()


def _tag(name: str) -> str:
    for prefix, group in GROUPS.items():
        if name.startswith(prefix):
            return group + name.removeprefix(prefix)
    return f"train/{name}"
