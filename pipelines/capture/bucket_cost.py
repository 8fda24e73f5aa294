"""Objects, requests and bytes of a capture into a bucket, and of training from it.

Clouds charge by the class of a request: PUT and LIST cost some ten times as much as GET and HEAD.
Constants are what a capture asks for; `tests/pipelines/capture/test_bucket_cost.py` counts it.
"""

import math
from dataclasses import dataclass

from decant.store.mirrored_file import PAGE, PIECE

_BLOCK_ROWS = 64
"""Rows of a block of `data.shuffle = "blocks"`, as the trainer has them, which is not imported
here."""
_PUTS, _GETS = 30, 60
"""Of a capture, whatever its size: settings, tokenizer, plan, statistics, manifest."""
_PUTS_A_SHARD, _GETS_A_SHARD = 1, 3
"""A shard is text that one worker tokenises."""
_GETS_A_UNIT = 5
"""Of its rows, of the plan's version, and of commits that are not there yet."""
_OPENING = 2
"""Ranges of a file that are read when it is opened."""


@dataclass(frozen=True)
class Requests:
    """Requests by the class that is charged for, and the bytes of their bodies."""

    put: int
    get: int
    bytes: int


@dataclass(frozen=True)
class BucketCost:
    """What a cache takes in a bucket."""

    address: str
    region: str
    """Empty if it is not known."""
    objects: int
    capture: Requests
    epoch: Requests
    """At most, of the first epoch with the default shuffle. Later ones are read from the mirror,
    as far as it holds them."""
    epoch_in_blocks: Requests
    """The same with `data.shuffle = "blocks"`."""


def capture_requests(*, units: int, shards: int, files: int, signals: int, bytes: int) -> Requests:
    """Of a capture of `units` with this many `signals`, from `shards` of text; `files` are those of
    the units, rows included."""
    commits = units * signals
    return Requests(
        put=files + commits + shards * _PUTS_A_SHARD + _PUTS,
        get=units * _GETS_A_UNIT + files + commits + shards * _GETS_A_SHARD + _GETS,
        bytes=bytes,
    )


def epoch_requests(
    *,
    rows: int,
    units: int,
    rows_bytes: int,
    records: int,
    array_files: int,
    bytes: int,
    in_blocks: bool,
) -> Requests:
    """Of an epoch over `rows`, each of which has this many `records` beside the row itself, in
    files of `units`.

    Rows have `rows_bytes` and come in pieces of many, if the mirror has room for all of them.
    `bytes` are those of rows, records and arrays. An array's file is read once, whole.
    """
    runs_a_file = math.ceil(rows / _BLOCK_ROWS) if in_blocks else rows
    runs = min(math.ceil(rows_bytes / PIECE) + units, runs_a_file) + records * runs_a_file
    get = runs + _OPENING * units * (records + 1) + array_files
    return Requests(put=0, get=get, bytes=bytes + PAGE * runs)
