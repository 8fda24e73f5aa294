"""What a part's capture has agreed on before it starts, so that a rerun cannot drift.

`request.json` is what was asked for, written first: a directory belongs to one request.
`plan.json` is what tokenising and calibration found and froze; capture obeys it.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from decant.schemas.arrays.spec import ArraySpec, specs_of
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.disk.identity import canonical_json, digest
from decant.schemas.manifest.manifest import Part, Skipped, Source, Unit, unit_from_json
from decant.schemas.signals import ArraySignal, LogitsSignal, Signal, signal_from_json

VERSION = 2
"""2: a mesh where 1, which is read too, had `tensor_parallel`."""
CANARY = "canary-"
"""How the statistics begin that a worker is compared with."""
_SOURCES = "sources"
_NAMED = 5
"""Files that an error names."""


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
class MeshShape:
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
    mesh: MeshShape = MeshShape()
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


def as_sealed(plan: Plan, parts: Sequence[Part]) -> Plan:
    """The plan with its units as the directory's parts were sealed: rows left out for NaN too.

    Without canary rows if one of them was overwritten since: the teacher says something else of it.
    """
    units = dict(enumerate(plan.rows.units)) | dict(n for part in parts for n in part.numbered)
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


def with_teacher_at(model: str, path: Path) -> Plan:
    """The plan at `path`, which workers read, with the same teacher where it is now."""
    plan = read_plan(path)
    if plan.teacher.model != model:
        plan = dataclasses.replace(plan, teacher=dataclasses.replace(plan.teacher, model=model))
        write_plan(path, plan)
    return plan


def _planned_teacher(value: dict[str, Any]) -> PlannedTeacher:
    rest = {k: v for k, v in value.items() if k not in ("mesh", "tensor_parallel")}
    mesh = value.get("mesh") or {"tensor": value.get("tensor_parallel", 1)}
    return PlannedTeacher(**rest, mesh=MeshShape(**mesh))


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


def claim(
    path: Path, request: Mapping[str, Any], *, sources: Collection[Source], cache: Path
) -> None:
    """Bind the directory to `request` by writing it, or check that it is bound to the same.

    ValueError that names both sides of every difference, and the `sources` that are not what they
    were, when it belongs to another.
    """
    if not path.exists():
        named = [[source.name, source.sha256] for source in sources]
        write_json(path, {**request, _SOURCES: named})
        return
    bound = read_json(path)
    different = [
        f"  {name}: there {_brief(bound.get(name))}, asked for {_brief(value)}"
        for name, value in request.items()
        # As JSON, which has no tuples.
        if canonical_json(bound.get(name)) != canonical_json(value)
    ]
    if different:
        changes = _changes(bound.get(_SOURCES), sources)
        remedy = "Choose another output, or ask for what it holds."
        if changes:
            remedy = "Bring its files back as they were (new ones beside them make a new part), or "
            remedy += "choose another output."
        raise ValueError(
            f"{cache}: this directory holds another capture\n"
            + "\n".join([*different, *changes])
            + f"\n{remedy}"
        )


def claimed_sources(request: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    """(name, sha256) of the files that a request names; releases until 0.3 did not write them."""
    named = request.get(_SOURCES)
    return None if named is None else [(name, sha256) for name, sha256 in named]


def _changes(bound: list[list[str]] | None, sources: Collection[Source]) -> list[str]:
    """A line of the files that are others; releases until 0.3 did not write down which they had."""
    then = {tuple(source) for source in bound or ()}
    now = {(source.name, source.sha256) for source in sources}
    gone, new = ({name for name, _ in some} for some in (then - now, now - then))
    found = [f"{name} has changed" for name in sorted(gone & new)]
    found += [f"{name} is missing" for name in sorted(gone - new)]
    found += [f"{name} is new" for name in sorted(new - gone)]
    if not then or not found:
        return []
    more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return [f"  files: {', '.join(found[:_NAMED])}{more}"]


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"


def _pairs(value: Any) -> tuple[tuple[int, int], ...]:
    return tuple((unit, offset) for unit, offset in value)
