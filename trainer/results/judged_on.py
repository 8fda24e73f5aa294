"""What a run is judged on: by default its own cache, and another teacher only on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decant.models import Checkpoint
from decant.models.text.tokenizer import tokenizer_of
from decant.schemas import Cache, open_cache
from decant.trainer.config import Evaluate
from decant.trainer.run.binding import read_run_settings
from decant.trainer.run.data_facts import main_cache, read_data_facts
from decant.trainer.run.initial_student import check_covers_cache

DEFAULT = Path("runs/cache")
"""Cache to judge on if the run, begun before release 0.8, does not say which is its own."""
_LEAST_CHARACTERS = 8


def cache_to_judge_on(config: Evaluate) -> Cache:
    """The cache that `config.cache` names, or the one that the run learned from.

    ValueError if it holds rows without targets, or targets of a teacher that the run did not learn
    from and that `config.other_teacher` does not name.
    """
    own = main_cache(config.run)
    cache = open_cache(config.cache or own or DEFAULT)
    if "logits" not in cache.manifest.signals:
        raise ValueError(
            f"{cache.path}: holds rows without a teacher's targets, so there is nothing to judge a "
            "student by; choose a cache that `decant precompute` made"
        )
    if is_other_teacher(cache, run=config.run):
        _require_named(config, cache, own=own)
    return cache


def is_other_teacher(cache: Cache, *, run: Path) -> bool:
    """Whether the run learned from no cache of this cache's teacher."""
    logits = cache.manifest.logits
    if facts := read_data_facts(run):
        return logits.teacher_id not in _teachers(facts)
    # A release before 0.5 recorded no teacher, but the id of the targets, which includes it.
    return read_run_settings(run).get("signal_id logits") != logits.signal_id


def check_student(student: Checkpoint, cache: Cache, *, run: Path) -> None:
    """ValueError unless the student has the cache's tokenizer, token ids and positions."""
    check_covers_cache(student.config, cache=cache, name=f"the student of {run}")
    if why := tokenizer_of(cache).difference(student.tokenizer()):
        raise ValueError(
            f"{cache.path}: captured with another tokenizer than the student of {run} has; token "
            f"ids would not line up. {why}. Name a cache captured with its tokenizer"
        )


def describe(evaluation: Mapping[str, Any]) -> str:
    """What an evaluation was made on, in a few words."""
    text = f"{evaluation['rows']:,} held-out rows of cache {evaluation['cache_id'][:12]}"
    if evaluation.get("other_teacher"):
        text += f", against ANOTHER TEACHER than the student's: {evaluation['teacher_id'][:12]}"
    return text


def _require_named(config: Evaluate, cache: Cache, *, own: Path | str | None) -> None:
    theirs, named = cache.manifest.logits.teacher_id, config.other_teacher or ""
    if len(named) >= _LEAST_CHARACTERS and theirs.startswith(named):
        return
    ours = ", ".join(id_[:12] for id_ in _teachers(read_data_facts(config.run)))
    remedy = f"leave out --cache to judge on the run's own, {own}" if own else "choose its own"
    raise ValueError(
        f"{cache.path}: holds targets of teacher {theirs[:12]}, but {config.run} learned from "
        f"{ours or 'another, which it does not record'}"
        + (f", and --other-teacher names {named!r}" if named else "")
        + f". Either {remedy}, or add --other-teacher {theirs[:12]} to judge against this teacher"
    )


def _teachers(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    return [one["teacher_id"] for one in facts if one["teacher_id"]]
