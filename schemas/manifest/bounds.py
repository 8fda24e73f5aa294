"""What the numbers and ids of a manifest, plan or commit may be, checked when one is parsed.

A reader allocates by these numbers and prints these ids, and a stranger may have written them. All
functions raise ValueError with the value's name; whoever parses the file adds its path.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, NoReturn, get_args

from decant.schemas.codecs import PROFILES
from decant.schemas.disk.array_record import FileEntry
from decant.schemas.signals import (
    MEAN,
    AttentionDtype,
    AttentionSignal,
    CountsSignal,
    HiddenDtype,
    HiddenSignal,
    LogitsSignal,
    Signal,
    SketchSignal,
)
from decant.schemas.targets.counts import MOST_DRAWS
from decant.schemas.targets.targets import BETAS, EIGHTHS

POSITIONS = 1 << 20
"""Most positions of a row, and most ids of a vocabulary."""
ROWS = 1 << 20
"""Most rows of a unit."""
UNITS = 10**7
WIDTH = 1 << 20
LAYERS = 10**5
HEADS = 1 << 16
DRAWS = (1 << 16) - 1
BYTES = 1 << 60
_SHA256 = 64
_FINGERPRINT = 16
_HEX = frozenset("0123456789abcdef")
_SHOWN = 40


def require_number(name: str, value: Any, least: int, most: int) -> None:
    """`value` is a whole number from `least` to `most`."""
    # Not isinstance: True is an int.
    if type(value) is not int or not least <= value <= most:
        _refuse(name, value, f"a whole number from {least} to {most}")


def require_sha256(name: str, value: Any, *, digits: int = _SHA256) -> None:
    """`value` is a hash in hex. Every id is one."""
    if not isinstance(value, str) or len(value) != digits or not _HEX.issuperset(value):
        _refuse(name, value, f"{digits} of the digits 0 to 9 and a to f")


def require_one_of(name: str, value: Any, allowed: Collection[Any]) -> None:
    """`value` is one of `allowed`."""
    if not any(type(value) is type(one) and value == one for one in allowed):
        _refuse(name, value, "one of " + ", ".join(map(str, allowed)))


def require_weight(name: str, value: Any) -> None:
    """`value` is a finite number above 0."""
    if type(value) not in (int, float) or not 0 < value < math.inf:
        _refuse(name, value, "a number above 0")


def require_text(name: str, value: Any) -> None:
    """`value` is a string."""
    if not isinstance(value, str):
        _refuse(name, value, "a text")


def require_hashes(name: str, hashes: Any) -> None:
    """`hashes` maps names of files to sha256."""
    if not isinstance(hashes, dict):
        _refuse(name, hashes, "an object of hashes")
    for file, sha256 in hashes.items():
        require_sha256(f"{name} {file}", sha256)


def require_entry(name: str, entry: FileEntry) -> None:
    """The sizes and hashes of a unit's file."""
    require_number(f"bytes of {name}", entry.bytes, 0, BYTES)
    require_number(f"records of {name}", entry.records, 0, ROWS)
    require_sha256(f"sha256 of {name}", entry.sha256)
    if entry.fingerprint != "":
        require_sha256(f"fingerprint of {name}", entry.fingerprint, digits=_FINGERPRINT)


def require_offsets(name: str, offsets: Sequence[Any], rows: int) -> None:
    """`offsets` of a unit's rows are in it, in ascending order."""
    before = -1
    for offset in offsets:
        require_number(name, offset, before + 1, rows - 1)
        before = offset


def require_signal(name: str, signal: Signal, *, vocabulary: int) -> None:
    """The description of the signal called `name`."""
    require_sha256(f"signal_id of {name}", signal.signal_id)
    require_sha256(f"teacher_id of {name}", signal.teacher_id)
    if isinstance(signal, LogitsSignal):
        _require_logits(signal, vocabulary=vocabulary)
        return
    if isinstance(signal, CountsSignal):
        require_number("draws of counts", signal.draws, 1, MOST_DRAWS)
        return
    if isinstance(signal, SketchSignal):
        _require_sketch(signal)
        return
    require_number(f"layer of {name}", signal.layer, 0, LAYERS)
    require_number(f"shard_rows of {name}", signal.shard_rows, 1, ROWS)
    if isinstance(signal, HiddenSignal):
        require_one_of(f"dtype of {name}", signal.dtype, get_args(HiddenDtype))
        require_number(f"teacher_width of {name}", signal.teacher_width, 1, WIDTH)
        require_number(f"width of {name}", signal.width, 1, signal.teacher_width)
        kept = signal.variance_kept
        if type(kept) not in (int, float) or not 0 <= kept <= 2:
            _refuse(f"variance_kept of {name}", kept, "a share")
    else:
        _require_heads(name, signal)


def _require_logits(signal: LogitsSignal, *, vocabulary: int) -> None:
    require_one_of("profile of logits", signal.profile, PROFILES)
    require_number("k of logits", signal.k, 0, vocabulary + signal.unmatched)
    require_number("unmatched ids of logits", signal.unmatched, 0, POSITIONS)
    require_one_of("tail_at_1 of logits", signal.tail_at_1, (False, True))
    require_number("draws of logits", signal.draws, 0, DRAWS)
    require_one_of("betas of logits", signal.betas, (BETAS, EIGHTHS))
    for beta in signal.draw_betas:
        require_one_of("draw_betas of logits", beta, BETAS[1:])
    require_one_of("labels of logits", signal.labels, (False, True))
    if signal.mass is not None and not (type(signal.mass) is float and 0 < signal.mass <= 1):
        _refuse("mass of logits", signal.mass, "a share")
    if signal.mass is not None and (signal.draws or not signal.k):
        _refuse("mass of logits", signal.mass, "none, with tail draws or without ids")


def _require_sketch(signal: SketchSignal) -> None:
    require_number("teacher_width of sketch", signal.teacher_width, 1, WIDTH)
    require_number("rank of sketch", signal.rank, 1, signal.teacher_width)
    require_one_of("dither of sketch", signal.dither, (False, True))
    if signal.asked_rank is not None:
        require_number("asked_rank of sketch", signal.asked_rank, 1, signal.teacher_width)
    if type(signal.variance_kept) not in (int, float) or not 0 <= signal.variance_kept <= 1.001:
        _refuse("variance_kept of sketch", signal.variance_kept, "a share")
    if type(signal.step) not in (int, float) or not 0 <= signal.step < math.inf:
        _refuse("step of sketch", signal.step, "a number, at least 0")
    cap = signal.softcap
    if cap is not None and not (type(cap) in (int, float) and 0 < cap < math.inf):
        _refuse("softcap of sketch", cap, "a number above 0")


def _require_heads(name: str, signal: AttentionSignal) -> None:
    require_one_of(f"dtype of {name}", signal.dtype, get_args(AttentionDtype))
    require_number(f"teacher_heads of {name}", signal.teacher_heads, 1, HEADS)
    if signal.heads == MEAN:
        return
    require_number(f"number of heads of {name}", len(signal.heads), 1, signal.teacher_heads)
    for head in signal.heads:
        require_number(f"heads of {name}", head, 0, signal.teacher_heads - 1)


def _refuse(name: str, value: Any, expected: str) -> NoReturn:
    text = repr(value)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    raise ValueError(f"{name:.80} is {text}; expected {expected}")
