"""A run's event files as TensorBoard shows them: in the order of names, purged at restarts."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c


def shown_by_tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs by tag. A session start hides earlier values from its step on."""
    shown: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(run.glob("*tfevents*")):
        events = list(events_of(path.read_bytes()))
        assert events[0].file_version == "brain.Event:2"
        for event in events[1:]:
            if event.session_log.status == SessionLog.START:
                kept = {t: [x for x in xs if x[0] < event.step] for t, xs in shown.items()}
                shown = {tag: values for tag, values in kept.items() if values}
            for value in event.summary.value:
                shown.setdefault(value.tag, []).append((event.step, value.simple_value))
    return shown


def events_of(data: bytes):
    """Events of all whole records, checksums checked. A truncated record ends the file."""
    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack("<Q", data[at : at + 8])
        if at + 16 + length > len(data):
            return
        payload = data[at + 12 : at + 12 + length]
        sums = data[at + 8 : at + 12], data[at + 12 + length : at + 16 + length]
        for part, stored in zip((data[at : at + 8], payload), sums, strict=True):
            assert struct.pack("<I", masked_crc32c(part)) == stored
        yield Event.FromString(payload)
        at += 16 + length
