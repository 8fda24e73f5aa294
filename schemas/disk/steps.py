"""The moments at which a writer may die, by name: a test kills at every one of them.

A file is written under a temporary name, flushed to disk, then given its name; a unit is committed
file by file with its commits last, a part is sealed by the manifest. What is left of any moment is
gone on with by the next run.
"""

from enum import StrEnum
from typing import Literal

File = Literal["rows", "shard", "plan", "logits", "array", "commit", "manifest", "other"]
"""Kinds of files; the moments of `other` have no name."""
Moment = Literal["written", "flushed", "named"]


class Step(StrEnum):
    """In the order in which a capture first reaches them."""

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


def reached(step: Step) -> None:
    """Called once a step is taken. Does nothing: tests put what they like in its place."""


def file_reached(kind: File, moment: Moment) -> None:
    """A file has come this far."""
    if kind != "other":
        reached(Step(f"{kind} {moment}"))
