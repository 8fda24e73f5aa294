"""What a part's capture has agreed on before it starts, so that a rerun cannot drift.

`plan.json` holds what tokenising and calibration chose; capture and every rerun obey it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from decant.schemas.arrays.spec import ArraySpec, specs_of
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.disk.identity import digest
from decant.schemas.manifest.manifest import Part, Skipped, Source, Unit, unit_from_json
from decant.schemas.signals import ArraySignal, LogitsSignal, Signal, signal_from_json

VERSION = 2
"""2: a mesh where 1, which is read too, had `tensor_parallel`."""
CANARY = "canary-"
"""How the statistics begin that a worker is compared with."""


@dataclass(frozen=True)
class PlannedRows:
    """What tokenising produced. Each unit's `files` holds only its rows."""

    rows_id: str
    unit_rows: int
    units: tuple[Unit, ...]
    sources: tuple[Source, ...]
    skipped: tuple[Skipped, ...]
    duplicates: int
    sample: tuple[tuple[int, int], ...]
    """(unit, offset) of the train rows with the smallest keys, smallest first."""


@dataclass(frozen=True)
class TeacherMesh:
    """How a host's devices share the work: `tensor` · `expert` of them hold one model."""

    data: int | None = None
    """Copies of the model, each with its share of a batch's rows. Unset: as many as there are
    devices for."""
    tensor: int = 1
    """Devices that split every matrix and the vocabulary."""
    expert: int = 1
    """Devices that split the experts of a mixture."""


@dataclass(frozen=True)
class PlannedTeacher:
    """The teacher and the fixed shapes that it runs at."""

    model: str
    """Where a worker finds it; not part of any identity."""
    teacher_id: str
    dtype: str
    vocabulary_size: int
    sequence_length: int
    batch_rows: int
    mesh: TeacherMesh = TeacherMesh()
    quantize: Literal["none", "int8"] = "none"


@dataclass(frozen=True)
class Plan:
    """All that capture needs to know, frozen."""

    tokenizer: str
    rows: PlannedRows
    teacher: PlannedTeacher
    signals: dict[str, Signal]
    statistics: dict[str, str]
    """sha256 of each file under `statistics/`."""
    canary: tuple[tuple[int, int], ...]
    """(unit, offset) of the rows that a worker re-runs before its first unit."""
    on_error: str
    version: int = VERSION

    @property
    def arrays(self) -> dict[str, ArraySignal]:
        """The signals that are stored in arrays, by name."""
        return {n: s for n, s in self.signals.items() if not isinstance(s, LogitsSignal)}

    def specs(self, name: str) -> dict[str, ArraySpec]:
        """The arrays of the signal called `name`, by their own names."""
        slots = len(self.rows.units) * self.rows.unit_rows
        length = self.teacher.sequence_length
        return specs_of(self.arrays[name], name=name, slots=slots, sequence_length=length)


def rows_id_of(rows: PlannedRows, numbers: Sequence[int]) -> str:
    """Identity of the rows of some of the units: they are other rows than all of them."""
    if len(numbers) == len(rows.units):
        return rows.rows_id
    return digest({"rows": rows.rows_id, "units": list(numbers)})


def plan_as_sealed(plan: Plan, parts: Sequence[Part]) -> Plan:
    """The plan with its units as the directory's parts were sealed: rows left out for NaN too.

    Without canary rows if one of them was overwritten since: the teacher says something else of it.
    """
    units = dict(enumerate(plan.rows.units)) | dict(
        n for part in parts for n in part.numbered_units
    )
    rows = dataclasses.replace(plan.rows, units=tuple(units[n] for n in sorted(units)))
    sealed = {name for part in parts for name in part.statistics}
    kept = any(name.startswith(CANARY) for name in sealed)
    return dataclasses.replace(plan, rows=rows, canary=plan.canary if kept else ())


def write_plan(path: Path, plan: Plan) -> None:
    """Freeze `plan`."""
    write_json(path, dataclasses.asdict(plan), kind="plan")


def read_plan(path: Path) -> Plan:
    """The plan at `path`. ValueError if it is damaged or of another version."""
    value = read_json(path)
    if value.get("version") not in (1, VERSION):
        raise ValueError(f"{path}: plan version {value.get('version')}, expected {VERSION}")
    signals = {name: signal_from_json(name, signal) for name, signal in value["signals"].items()}
    return Plan(
        **{
            **value,
            "rows": planned_rows_from_json(value["rows"]),
            "teacher": _planned_teacher(value["teacher"]),
            "signals": signals,
            "canary": _pairs(value["canary"]),
            "version": VERSION,
        }
    )


def set_teacher_model(model: str, path: Path) -> Plan:
    """The plan at `path`, which workers read, with the same teacher where it is now."""
    plan = read_plan(path)
    if plan.teacher.model != model:
        plan = dataclasses.replace(plan, teacher=dataclasses.replace(plan.teacher, model=model))
        write_plan(path, plan)
    return plan


def _planned_teacher(value: dict[str, Any]) -> PlannedTeacher:
    rest = {k: v for k, v in value.items() if k not in ("mesh", "tensor_parallel")}
    mesh = value.get("mesh") or {"tensor": value.get("tensor_parallel", 1)}
    return PlannedTeacher(**rest, mesh=TeacherMesh(**mesh))


def planned_rows_from_json(value: dict[str, Any]) -> PlannedRows:
    """What `dataclasses.asdict` turned into JSON."""
    return PlannedRows(
        **{
            **value,
            "units": tuple(unit_from_json(unit) for unit in value["units"]),
            "sources": tuple(Source(**source) for source in value["sources"]),
            "skipped": tuple(Skipped(**skipped) for skipped in value["skipped"]),
            "sample": _pairs(value["sample"]),
        }
    )


def _pairs(value: Any) -> tuple[tuple[int, int], ...]:
    return tuple((unit, offset) for unit, offset in value)
