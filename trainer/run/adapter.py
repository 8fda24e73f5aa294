"""A run's adapter: its record in the run's directory, and the frozen base under it.

A base that is a whole checkpoint stays where it is: the run names it by its identity, and is
refused with another one. A base that was cut or drawn lies in the run's directory.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decant.models import Checkpoint, open_checkpoint
from decant.models.checkpoints.adapters import Lora
from decant.models.checkpoints.hub import without_commit
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.disk.identity import digest, digest_memory
from decant.trainer.config import Adapter, Student

RECORD = "adapter.json"
"""In the directory of the initial student."""


@dataclass(frozen=True)
class AdapterRecord:
    """What a run's adapter is, and on which weights it stands."""

    lora: Lora
    alpha: float
    root: bool
    """s = α / √rank."""
    seed: int
    dtype: str
    """Of the frozen weights."""
    base: str | None = None
    """Identity of the checkpoint under it; None: the base lies in the run's directory."""
    pinned: str | None = None
    """The checkpoint's hub id with its commit, if it has one."""

    @classmethod
    def of(cls, config: Student, *, seed: int) -> AdapterRecord | None:
        """The record of a new run; None if all weights are trained.

        ValueError for settings of an adapter without a rank.
        """
        asked = config.adapter
        if asked.rank is None:
            if asked != Adapter():
                name = next(n for n, x in asdict(asked).items() if x != getattr(Adapter(), n))
                raise ValueError(
                    f"student.adapter.{name} is given, but student.adapter.rank is not; set the "
                    "rank, such as 16, or leave the adapter out"
                )
            return None
        alpha, root = asked.alpha or 2.0 * asked.rank, asked.scaling == "root"
        lora = Lora(asked.rank, alpha / asked.rank ** (0.5 if root else 1), asked.targets)
        return cls(lora, alpha, root, seed, asked.base)

    def write(self, directory: Path) -> None:
        """Write it into the directory of the initial student."""
        write_json(directory / RECORD, asdict(self))


def read_adapter(directory: Path) -> AdapterRecord | None:
    """The record in the directory of an initial student; None if all weights are trained."""
    if not (directory / RECORD).exists():
        return None
    values: dict[str, Any] = read_json(directory / RECORD, holds="lora")
    lora = values.pop("lora")
    return AdapterRecord(Lora(lora["rank"], lora["scaling"], tuple(lora["targets"])), **values)


def base_identity(checkpoint: Checkpoint) -> str:
    """Identity of a base: its weights and its shape. Weights are hashed once."""
    weights = checkpoint.files.weight_sha256s(memory=digest_memory())
    shape = checkpoint.config.identity()
    return digest({"weights": sorted(weights.values()), "config": shape})


def open_base(record: AdapterRecord, source: str, *, run: Path) -> Checkpoint:
    """The checkpoint under a run's adapter; `source` is the run's `student.source`.

    ValueError if another one is there, FileNotFoundError if none is.
    """
    place = source
    if record.pinned and without_commit(record.pinned) == source:
        place = record.pinned
    elif (run / source).exists():
        place = str(run / source)
    try:
        checkpoint = open_checkpoint(place)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{run}: the base of its adapter: {error} {_MOVED}") from error
    if (found := base_identity(checkpoint)) != record.base:
        raise ValueError(
            f"{run}: its adapter stands on a base of identity {str(record.base)[:12]}, but {place} "
            f"has {found[:12]}: other weights. Bring the base back. {_MOVED}"
        )
    return checkpoint


_MOVED = (
    "If it lies elsewhere now, continue the run once with --student.source PLACE --allow "
    "student.source"
)
