"""`plan.json`: all choices of tokenising and calibration. Capture and every rerun obey it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from decant.command_line.checks import DEVICES
from decant.schemas.arrays.spec import ArraySpec, specs_of
from decant.schemas.disk.array_record import as_json
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.disk.identity import digest
from decant.schemas.disk.layout import ADDITION, LOGITS, ROWS, PartLayout
from decant.schemas.disk.names import require_names
from decant.schemas.disk.stand_in import names_in
from decant.schemas.manifest import bounds
from decant.schemas.manifest.manifest import (
    Aligned,
    Part,
    Skipped,
    Source,
    Unit,
    aligned_from_json,
    require_sources,
    require_unit,
    unit_from_json,
)
from decant.schemas.signals import (
    ArraySignal,
    LogitsSignal,
    RecordSignal,
    Signal,
    signal_from_json,
)

VERSION = 2
"""Version 2 has `mesh`. Version 1 had `tensor_parallel` and can be read."""
CANARY = "canary-"
"""Prefix of the statistics that hold the canary rows' targets."""


@dataclass(frozen=True)
class PlannedRows:
    """The result of tokenising. Each unit's `files` holds only the entry of its rows."""

    rows_id: str
    unit_rows: int
    units: tuple[Unit, ...]
    sources: tuple[Source, ...]
    skipped: tuple[Skipped, ...]
    duplicates: int
    sample: tuple[tuple[int, int], ...]
    """(unit, offset) of the train rows with the smallest keys, in ascending order."""
    unwritten: Mapping[str, int] = field(default_factory=dict)
    """Number of chats of which the chat template left out their `tools`, or another named thing."""
    writers: Mapping[str, int] = field(default_factory=dict)
    """As in `Part`."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """As in `Part`."""


@dataclass(frozen=True)
class TeacherMesh:
    """How a host's devices share the teacher: `tensor` × `expert` devices hold one copy of it."""

    data: Annotated[int | None, DEVICES] = None
    """Copies of the model; each computes its share of a batch's rows. Unset: as many as fit the
    host's devices and divide the batch."""
    tensor: Annotated[int, DEVICES] = 1
    """Devices across which every matrix and the vocabulary are split."""
    expert: Annotated[int, DEVICES] = 1
    """Devices across which the experts of a mixture-of-experts model are split."""


@dataclass(frozen=True)
class PlannedTeacher:
    """The teacher and the fixed shapes of its batches."""

    model: str
    """Where a worker finds the model: a path or hub id. Not part of any identity."""
    teacher_id: str
    dtype: str
    vocabulary_size: int
    sequence_length: int
    batch_rows: int
    mesh: TeacherMesh = TeacherMesh()
    quantize: Literal["none", "int8"] = "none"


@dataclass(frozen=True)
class Plan:
    """All choices that capture obeys."""

    tokenizer: str
    rows: PlannedRows
    teacher: PlannedTeacher
    signals: dict[str, Signal]
    statistics: dict[str, str]
    """sha256 of each file under `statistics/`."""
    canary: tuple[tuple[int, int], ...]
    """(unit, offset) of the canary rows, which a worker re-runs before its first unit."""
    on_error: str
    version: int = VERSION
    coded_with: LogitsSignal | None = None
    """The sealed logits whose records the plan's counts are coded with; None if the plan captures
    the logits too, or no counts."""
    aligned: Aligned | None = None
    """What the part is made from; None if a teacher reads its rows."""
    aligned_with: str = ""
    """Where that cache was; not part of any identity."""

    @property
    def arrays(self) -> dict[str, ArraySignal]:
        """Signals that are stored in arrays, by name."""
        return {n: s for n, s in self.signals.items() if not isinstance(s, RecordSignal)}

    def specs(self, name: str) -> dict[str, ArraySpec]:
        """The arrays of the signal called `name`, by array name."""
        slots = len(self.rows.units) * self.rows.unit_rows
        length = self.teacher.sequence_length
        return specs_of(self.arrays[name], name=name, slots=slots, sequence_length=length)


def additions(layout: PartLayout) -> list[Path]:
    """Plans of all additions that are not yet sealed."""
    names = names_in(layout.root, ".json")
    return [layout.root / name for name in sorted(names) if name.startswith(ADDITION)]


def rows_id_of(rows: PlannedRows, numbers: Sequence[int]) -> str:
    """Identity of the rows in the units with these `numbers`: `rows.rows_id` if they are all."""
    if len(numbers) == len(rows.units):
        return rows.rows_id
    return digest({"rows": rows.rows_id, "units": list(numbers)})


def plan_as_sealed(plan: Plan, parts: Sequence[Part]) -> Plan:
    """The plan with its units as the manifest's `parts` of this directory hold them.

    A sealed unit also lists the rows skipped for NaN. The canary rows are dropped if one of them
    has been overwritten, because the teacher's targets of that row changed.
    """
    units = dict(enumerate(plan.rows.units))
    for part in parts:
        units |= dict(part.numbered_units)
    rows = dataclasses.replace(plan.rows, units=tuple(units[n] for n in sorted(units)))
    sealed = {name for part in parts for name in part.statistics}
    kept = any(name.startswith(CANARY) for name in sealed)
    return dataclasses.replace(plan, rows=rows, canary=plan.canary if kept else ())


def write_plan(path: Path, plan: Plan, *, first: bool = False) -> None:
    """Write `plan` to `path`; `first` as for `write_bytes`."""
    write_json(path, as_json(plan), kind="plan", first=first)


def read_plan(path: Path) -> Plan:
    """The plan at `path`. ValueError if it is damaged or of an unknown version."""
    value = read_json(path)
    if value.get("version") not in (1, VERSION):
        raise ValueError(
            f"{path}: plan version {value.get('version')}, this release reads 1 and {VERSION}; "
            "use the release that wrote it or a newer one"
        )
    try:
        return _plan_from_json(value)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not a plan: {error}") from error


def _plan_from_json(value: dict[str, Any]) -> Plan:
    require_names("statistic", value["statistics"])
    signals = {name: signal_from_json(name, signal) for name, signal in value["signals"].items()}
    coded_with = value.get("coded_with")
    plan = Plan(
        **{
            **value,
            "coded_with": coded_with and signal_from_json(LOGITS, coded_with),
            "rows": planned_rows_from_json(value["rows"]),
            "teacher": _planned_teacher(value["teacher"]),
            "signals": signals,
            "canary": _pairs(value["canary"]),
            "aligned": aligned_from_json(value.get("aligned")),
            "version": VERSION,
        }
    )
    _require_plan(plan)
    return plan


def _require_plan(plan: Plan) -> None:
    teacher, rows = plan.teacher, plan.rows
    length = teacher.sequence_length
    bounds.require_number("sequence_length", length, 1, bounds.POSITIONS)
    bounds.require_number("vocabulary_size", teacher.vocabulary_size, 1, bounds.POSITIONS)
    bounds.require_number("batch_rows", teacher.batch_rows, 1, bounds.ROWS)
    for name, value in dataclasses.asdict(teacher.mesh).items():
        if (name, value) != ("data", None):
            bounds.require_number(f"mesh.{name}", value, 1, bounds.HEADS)
    for name in ("model", "dtype"):
        bounds.require_text(name, getattr(teacher, name))
    bounds.require_one_of("quantize", teacher.quantize, ("none", "int8"))
    bounds.require_sha256("teacher_id", teacher.teacher_id)
    bounds.require_sha256("tokenizer", plan.tokenizer)
    bounds.require_sha256("rows_id", rows.rows_id)
    bounds.require_hashes("statistics", plan.statistics)
    coded_with = {LOGITS: plan.coded_with} if plan.coded_with else {}
    for name, signal in {**coded_with, **plan.signals}.items():
        bounds.require_signal(name, signal, vocabulary=teacher.vocabulary_size)
    bounds.require_number("unit_rows", rows.unit_rows, 1, bounds.ROWS)
    require_sources(rows.sources)
    for name, weight in rows.weights.items():
        bounds.require_weight(f"weight of {name!r}", weight)
    for unit in rows.units:
        require_unit(unit, signals=(), most=rows.unit_rows, length=length)
    bounds.require_text("aligned_with", plan.aligned_with)
    for number, offset in (*rows.sample, *plan.canary):
        bounds.require_number("unit of a sampled row", number, 0, len(rows.units) - 1)
        bounds.require_number("offset of a sampled row", offset, 0, rows.units[number].rows - 1)


def set_teacher_model(model: str, path: Path) -> Plan:
    """The plan at `path`, rewritten first if the same teacher has moved to `model`."""
    plan = read_plan(path)
    if plan.teacher.model != model:
        plan = dataclasses.replace(plan, teacher=dataclasses.replace(plan.teacher, model=model))
        write_plan(path, plan)
    return plan


def set_overwritten_rows(parts: Sequence[Part], plan: Plan, path: Path) -> Plan:
    """`plan`, rewritten at `path` first if `gc` has overwritten rows of its sealed `parts`."""
    sealed = plan_as_sealed(plan, parts)
    pairs = zip(plan.rows.units, sealed.rows.units, strict=True)
    if all(before.files[ROWS] == now.files[ROWS] for before, now in pairs):
        return plan
    if not sealed.canary:  # `gc` has deleted their statistics
        kept = {n: sha for n, sha in plan.statistics.items() if not n.startswith(CANARY)}
        sealed = dataclasses.replace(sealed, statistics=kept)
    write_plan(path, sealed)
    return sealed


def _planned_teacher(value: dict[str, Any]) -> PlannedTeacher:
    rest = {k: v for k, v in value.items() if k not in ("mesh", "tensor_parallel")}
    mesh = value.get("mesh") or {"tensor": value.get("tensor_parallel", 1)}
    return PlannedTeacher(**rest, mesh=TeacherMesh(**mesh))


def planned_rows_from_json(value: dict[str, Any]) -> PlannedRows:
    """The planned rows from the JSON form of their `as_json`."""
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
