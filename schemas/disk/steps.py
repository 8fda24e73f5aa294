"""Named steps of a capture and of `gc`, so that a test can kill the process at each of them.

A file is written under a temporary name, flushed to disk, then named. A unit's files are written
first, its commits last. The manifest seals a part. The next run continues from whatever a kill
left on disk.
"""

from enum import StrEnum
from typing import Literal

File = Literal["rows", "shard", "plan", "logits", "array", "commit", "manifest", "journal", "other"]
"""Kinds of files; `logits` are those of counts and sketches too. Files of kind `other` have no
named steps."""
Moment = Literal["written", "flushed", "named"]


class Step(StrEnum):
    """The steps, in the order in which a capture first reaches them; then those of `gc`."""

    ROWS_WRITTEN = "rows written"
    ROWS_FLUSHED = "rows flushed"
    ROWS_NAMED = "rows named"
    SHARD_WRITTEN = "shard written"
    SHARD_FLUSHED = "shard flushed"
    SHARD_NAMED = "shard named"
    ROWS_GATHERED = "rows gathered"
    PLAN_WRITTEN = "plan written"
    PLAN_FLUSHED = "plan flushed"
    PLAN_NAMED = "plan named"
    UNIT_BEGUN = "unit begun"
    ARRAY_WRITTEN = "array written"
    ARRAY_FLUSHED = "array flushed"
    ARRAY_NAMED = "array named"
    UNIT_COMPUTED = "unit computed"
    LOGITS_WRITTEN = "logits written"
    LOGITS_FLUSHED = "logits flushed"
    LOGITS_NAMED = "logits named"
    COMMIT_WRITTEN = "commit written"
    COMMIT_FLUSHED = "commit flushed"
    COMMIT_NAMED = "commit named"
    UNIT_COMMITTED = "unit committed"
    COMMITS_CHECKED = "commits checked"
    MANIFEST_LOCKED = "manifest locked"
    MANIFEST_WRITTEN = "manifest written"
    MANIFEST_FLUSHED = "manifest flushed"
    MANIFEST_NAMED = "manifest named"
    SEALED = "sealed"
    JOURNAL_WRITTEN = "journal written"
    JOURNAL_FLUSHED = "journal flushed"
    JOURNAL_NAMED = "journal named"
    FILE_MOVED = "file moved"
    OVERWRITTEN = "overwritten"
    OBJECT_DELETED = "object deleted"
    """Of a bucket."""


def reached(step: Step) -> None:
    """Called after each step. Does nothing; tests replace it."""


def file_reached(kind: File, moment: Moment) -> None:
    """Report the step of a file of this kind; no-op for `other`."""
    if kind != "other":
        reached(Step(f"{kind} {moment}"))
