"""`train --sweep`: train several students from one cache, one after another, and compare them.

Each student is an ordinary run in a directory of its own. A sweep that is started again keeps
finished students and continues the unfinished one. All are evaluated on the same held-out rows.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from decant.command_line.checks import COUNT, Command
from decant.command_line.config_file import checked, read_settings, read_table
from decant.command_line.config_paths import ConfigPaths
from decant.command_line.local_paths import IS_OUTPUT
from decant.command_line.result import Result
from decant.command_line.settings import parse_settings
from decant.command_line.value_types import require_type
from decant.progress import notices
from decant.schemas.disk.atomic import write_bytes
from decant.trainer.config import Evaluate, Train
from decant.trainer.data.batches import number_of_updates
from decant.trainer.data.mixture import check_mixture, open_for, open_others
from decant.trainer.judging.headline import common_estimate
from decant.trainer.judging.standard_error import paired_difference
from decant.trainer.judging.teacher_reference import teacher_ce
from decant.trainer.loss.batch_fields import check_targets
from decant.trainer.results.evaluate import evaluate
from decant.trainer.run.binding import read_run_settings
from decant.trainer.run.checkpoint import latest_step
from decant.trainer.run.loss_inputs import resolve_layers, with_tail
from decant.trainer.run.metrics_log import Place
from decant.trainer.run.train import train
from decant.trainer.run.trained import Trained

COMPARISON = "comparison.json"
_KEYS = {
    "run": str,
    "heldout_rows": int,
    "base": dict,
    "students": list[dict],
    "grid": dict,
}
"""Keys of a sweep file, with the types of their values."""


@dataclass(frozen=True)
class Sweep(Command):
    """The students to train and the rows to compare them on."""

    run: Path
    """Directory of the comparison; each student's run is a directory in it."""
    students: dict[str, Train]
    """Settings of each student, by name."""
    heldout_rows: Annotated[int | None, COUNT] = None
    """Held-out rows for the comparison at the end, spread evenly; None: all."""


def read_sweep(path: Path, shared: Path | None = None, flags: Sequence[str] = ()) -> Sweep:
    """Read a sweep file; the config file `shared` and `flags` hold for all students.

    Settings of a student, the strongest first: flags, its table in `[[students]]`, its values of
    `[grid]` (one student for each combination), `[base]`, the config file. Paths in a file are
    relative to that file. Raises ValueError for unknown keys, equal names, or students with
    different caches.
    """
    table = read_table(path)
    for key in table:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_KEYS)}"
            raise ValueError(f"{path}: unknown key {key}; {hint}")
        require_type(table[key], _KEYS[key], where=f"{path}: {key}")
    below = [read_settings(Train, shared)] if shared else []
    below.append(checked(Train, table.get("base", {}), path=path))
    directory = Path(f"runs/{path.stem}")
    if "run" in table:
        run = ConfigPaths(path).located(table["run"], setting="run", metadata=IS_OUTPUT)
        directory = Path(run)
    students: dict[str, Train] = {}
    for name, own in _students(table, path=path):
        program = f"{path}, student {name}"
        try:
            tables = [checked(Train, one, path=path) for one in own]
            config = parse_settings(Train, [*below, *tables], flags, program=program)
        except ValueError as error:
            raise ValueError(f"student {name}: {error}") from None
        if name in students:
            raise ValueError(f"{path}: two students are called {name!r}; give each its own name")
        students[name] = dataclasses.replace(config, run=directory / name)
    caches = sorted({str(config.cache) for config in students.values()})
    if len(caches) != 1:
        raise ValueError(
            f"{path}: a sweep compares students on the held-out rows of one cache, but these "
            f"have {', '.join(caches)}. Give all the same `cache` and add others in data.caches"
        )
    return Sweep(directory, students, table.get("heldout_rows"))


def _students(table: Mapping[str, Any], *, path: Path) -> Iterator[tuple[str, list[dict]]]:
    """Name of each student, and its tables of settings, the weakest first."""
    grid, listed = _flat(table.get("grid", {})), table.get("students", [{}])
    for number, student in enumerate(listed):
        require_type(student.get("name", ""), str, where=f"{path}: students[{number}].name")
        own = {key: value for key, value in student.items() if key != "name"}
        called = student.get("name", "" if len(listed) == 1 and grid else f"student-{number}")
        if "run" in own or "/" in called or called.startswith("."):
            raise ValueError(
                f"{path}: student {called or number}: a student's directory is its name inside the "
                "sweep's `run`, so the name must not be a path, and a student has no `run`"
            )
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            varied = [f"{key.rpartition('.')[2]}={value}" for key, value in chosen.items()]
            name = "-".join([*([called] if called else []), *varied])
            yield name, [_nested(key, value) for key, value in chosen.items()] + [own]


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, list]:
    """Values by dotted name, from `"loss.alpha" = […]` or `[grid.loss] alpha = […]`."""
    flat: dict[str, list] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value:
            flat[prefix + key] = value
        else:
            raise ValueError(
                f"grid: {prefix}{key} is {value!r}; expected a list of values, not empty"
            )
    return flat


def _nested(name: str, value: Any) -> dict[str, Any]:
    """`{"loss": {"alpha": value}}` for `loss.alpha`."""
    first, _, rest = name.partition(".")
    return {first: _nested(rest, value) if rest else value}


def sweep(config: Sweep, *, console: Console | None = None) -> Result:
    """Train all students, compare them and write `comparison.json`, the result's document.

    The result's status is 1 if a student failed or a signal stopped the sweep. Raises ValueError
    for settings that do not fit the cache, before any student begins.
    """
    quiet = all(student.quiet for student in config.students.values())
    console = console or notices(quiet=quiet)
    updates = [_check(student, name) for name, student in config.students.items()]
    before = read_comparison(config.run)["students"]
    failed: dict[str, str] = {}
    for number, (name, student) in enumerate(config.students.items(), 1):
        console.print(f"student {number} of {len(config.students)}: {name} in {student.run}")
        place = Place(name, number, len(config.students), sum(updates[number:]))
        try:
            trained = train(student, place=place)
            if not trained.finished:
                return _stopped(config, trained, place)
        except (FloatingPointError, ValueError, OSError) as error:
            # The other students do not depend on this one.
            console.print(f"error: {error}", markup=False)
            failed[name] = str(error)
    trained_students = {n: c for n, c in config.students.items() if n not in failed}
    ranked = rank_students(trained_students, heldout_rows=config.heldout_rows)
    # A student that fails now may have a run that an earlier sweep has judged.
    ranked += [{**one, "earlier": True} for one in before if one["name"] in failed]
    ranked = sort_students(ranked)
    document = {
        "cache": str(next(iter(config.students.values())).cache),
        "heldout_rows": config.heldout_rows,
        "students": ranked,
        "failed": failed,
    }
    write_bytes(config.run / COMPARISON, json.dumps(document, indent=1).encode())
    line = f"compared {len(ranked)} students in {config.run / COMPARISON}"
    if failed:
        line += f"; {', '.join(failed)} failed: {'; '.join(failed.values())}. Run the sweep again"
    elif ranked:
        line += f"; the best is {ranked[0]['name']}, in {config.students[ranked[0]['name']].run}"
    return Result(
        line,
        document,
        details=lambda console: console.print(comparison_table(ranked)),
        next=[["decant", "report", config.run]],
        status=1 if failed else 0,
    )


def _stopped(config: Sweep, trained: Trained, place: Place) -> Result:
    line = (
        f"stopped in student {place} after update {trained.step:,} of {trained.steps:,}; saved in "
        f"{trained.run}. To continue, run the same command again"
    )
    return Result(line, {"run": config.run, "stopped_in": trained.document()}, status=1)


def read_comparison(sweep: Path) -> dict[str, Any]:
    """`comparison.json` of a sweep's directory; without students if there is none yet.

    ValueError if it is damaged.
    """
    path = sweep / COMPARISON
    if not path.exists():
        return {"students": [], "failed": {}}
    try:
        found = json.loads(path.read_text("utf-8"))
        return {"students": list(found["students"]), "failed": dict(found["failed"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); move it away and run again") from error


def rank_students(
    students: Mapping[str, Train], *, heldout_rows: int | None
) -> list[dict[str, Any]]:
    """Each student's held-out metrics and the settings that differ."""
    run_settings = {name: read_run_settings(config.run) for name, config in students.items()}
    keys = dict.fromkeys(key for settings in run_settings.values() for key in settings)
    values = {key: {json.dumps(s.get(key)) for s in run_settings.values()} for key in keys}
    differing = [key for key in keys if len(values[key]) > 1]
    ranked = []
    for name, config in students.items():
        evaluate_config = Evaluate(
            run=config.run,
            cache=config.cache,
            heldout_rows=heldout_rows,
            dtype=config.dtype,
            quiet=config.quiet,
        )
        settings = {key: run_settings[name].get(key) for key in differing}
        step = latest_step(config.run)
        ranked.append(
            {"name": name, "step": step, "settings": settings, **evaluate(evaluate_config)}
        )
    return ranked


def sort_students(students: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lowest headline KL first. `behind`: how much higher a student's is than the first one's,
    compared row by row, and the standard error of that; None if this cannot be computed."""
    estimate = common_estimate(students)
    ranked = sorted(students, key=lambda student: student[estimate.metric])
    behind = [paired_difference(one, ranked[0], by=estimate.name) for one in ranked]
    return [
        {**{k: v for k, v in student.items() if k != "kl_by_row"}, "behind": difference}
        for student, difference in zip(ranked, behind, strict=True)
    ]


def comparison_table(ranked: Sequence[Mapping[str, Any]]) -> Table:
    """The students of `sort_students` as a table for the terminal, and the teacher's row."""
    estimate = common_estimate(ranked)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    # In a narrow window names and settings take several lines; figures are never cut.
    table.add_column("student, settings that differ", overflow="fold")
    for name, width in (("updates", 7), (estimate.title, 10), ("behind", 15), ("CE", 8)):
        table.add_column(name, justify="right", min_width=width)
    table.add_column("agreement", justify="right", min_width=9)
    for student in ranked:
        settings = [f"{key} {value}" for key, value in student["settings"].items()]
        name = student["name"] + (" (earlier)" if student.get("earlier") else "")
        behind = student["behind"] if student is not ranked[0] else None
        table.add_row(
            "\n".join([name, *settings]),
            str(student["step"]),
            f"{student[estimate.metric]:.4f}",
            f"{behind[0]:.4f} ± {behind[1]:.4f}" if behind else "",
            f"{student['heldout_ce']:.4f}",
            f"{student['heldout_agreement']:.1%}",
        )
    if ranked and (teacher := teacher_ce(ranked[0])):
        table.add_row("the teacher", "", "0", "", teacher, "100%")
    return table


def _check(config: Train, name: str) -> int:
    """The number of updates that are left to do.

    Raises ValueError, with the student's name, if its settings do not fit the cache."""
    try:
        cache = open_for(config.data, config.cache)
        check_targets(cache, loss=config.loss)
        others = open_others(config.data)
        config, _ = with_tail(config, cache=cache, others=others)
        check_targets(cache, loss=config.loss)
        config, pairs = resolve_layers(config, cache=cache)
        check_mixture(cache, others, loss=config.loss, pairs=pairs)
        return number_of_updates(cache, config=config.data) - (latest_step(config.run) or 0)
    except ValueError as error:
        raise ValueError(f"student {name}: {error}") from error
