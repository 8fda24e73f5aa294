"""The teacher_id of a checkpoint, and opening the checkpoint that a cache was captured with."""

from pathlib import Path

from decant.models import Checkpoint, open_checkpoint
from decant.models.checkpoints.checkpoint import Quantize
from decant.models.checkpoints.hub import HubId
from decant.models.numerics import dtype_named, precision_for
from decant.models.text.tokenizer import tokenizer_of
from decant.schemas import Cache
from decant.schemas.disk.identity import teacher_id
from decant.schemas.manifest.manifest import Part
from decant.schemas.manifest.plan import PlannedTeacher
from decant.store import is_url


def teacher_id_of(
    checkpoint: Checkpoint, *, dtype: str, quantize: Quantize, vocabulary: int, memory: Path
) -> str:
    """The teacher_id of a checkpoint that is run with these settings.

    `vocabulary` is the number of ids that it predicts. The file `memory` keeps the weight files'
    hashes between runs.
    """
    return teacher_id(
        weights=checkpoint.files.weight_sha256s(memory=memory),
        config=checkpoint.config.identity(),
        vocabulary=vocabulary,
        numerics=numerics(dtype, quantize),
    )


def numerics(dtype: str, quantize: Quantize) -> str:
    """How the teacher rounds, in words; part of teacher_id."""
    precision = precision_for(dtype_named(dtype)).name.lower()
    weights = ", int8 weights by output channel" if quantize == "int8" else ""
    return f"{dtype} operands, {precision} precision, float32 sums{weights}"


def open_teacher_of(
    cache: Cache,
    part: Part,
    planned: PlannedTeacher,
    teacher: str | None,
    *,
    fetch: bool,
    memory: Path,
) -> Checkpoint:
    """Open the checkpoint that `part` was captured with, at `teacher` or at the plan's path.

    Whoever made the cache chose what its plan names. A hub id that only the plan names is fetched
    if `fetch`; otherwise it must have been fetched before. ValueError if there is none, or one with
    another teacher_id or another tokenizer.
    """
    place = teacher or planned.model
    try:
        checkpoint = open_checkpoint(place, fetch=fetch or teacher is not None)
    except OSError as error:
        remedy = "If the teacher lies elsewhere now, say --teacher"
        if not teacher and not fetch and (HubId.parse(place) or is_url(place)):
            remedy += "; to fetch what the cache's plan names, say --fetch"
        raise ValueError(f"{error} {remedy}.") from error
    own_id = teacher_id_of(
        checkpoint,
        dtype=planned.dtype,
        quantize=planned.quantize,
        vocabulary=planned.vocabulary_size,
        memory=memory,
    )
    others = {n: s.teacher_id for n, s in part.signals.items() if s.teacher_id != own_id}
    if others:
        name, expected = next(iter(others.items()))
        raise ValueError(
            f"{place}: teacher_id {own_id[:12]} ({planned.dtype}), but {name} of {cache.path} was "
            f"captured by {expected[:12]}. Point --teacher at the checkpoint that made the cache."
        )
    if why := tokenizer_of(cache).difference(checkpoint.tokenizer()):
        raise ValueError(
            f"{place}: its tokenizer is not that of {cache.path}, so the teacher read the rows as "
            f"other text. {why}. Capture again."
        )
    return checkpoint
