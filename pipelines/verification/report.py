"""The command `verify`: runs a verification, prints a table or JSON, returns the exit status."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from decant.command_line.result import Result
from decant.pipelines.verification.content import Content
from decant.pipelines.verification.measures import Count, Figure
from decant.pipelines.verification.repair import Repair, repair
from decant.pipelines.verification.structure import check_structure
from decant.pipelines.verification.tolerances import ANY
from decant.pipelines.verification.verify import Verification, verify
from decant.schemas import open_cache
from decant.schemas.disk.identity import digest_memory
from decant.schemas.disk.stand_in import address_of, bucket_of, by_address, working_folder
from decant.schemas.manifest.manifest import read_manifest
from decant.schemas.reading.merged_parts import place_of
from decant.store import url_of

_COLUMNS = ("signal", "what", "mean", "p99", "max", "allowed: mean / p99 / max")
_SHOWN = 40
"""Problems printed in the terminal; `--json` prints all."""


def verify_and_report(
    path: Path,
    *,
    rows: int,
    teacher: str | None,
    fetch: bool,
    with_repair: bool,
    console: Console,
) -> Result:
    """Verify the cache at `path`, after repairing it if asked. Progress goes to `console`.

    `rows`, `teacher` and `fetch` are those of `verify`. The result's status is
    `Verification.status`, or 2, with an `error` in the document, if the cache could not be verified
    at all.
    """
    try:
        folder = working_folder(path, writing=with_repair)
        with by_address(folder):
            _require_own_parts(folder)
            repairs = _repair(folder, teacher, fetch=fetch, console=console) if with_repair else []
            result = verify(
                folder,
                rows=rows,
                teacher=teacher,
                fetch=fetch,
                memory=digest_memory(),
                console=console,
            )
        result.repairs = repairs
    except (ValueError, OSError, RuntimeError) as error:
        document = {"cache": url_of(path) or str(path), "status": 2, "error": str(error)}
        return Result(f"error: {error}", document, status=2)
    return Result(
        one_line(result),
        to_json(result),
        details=lambda console: print_verification(result, console),
        status=result.status,
    )


def _require_own_parts(cache: Path) -> None:
    """ValueError for a merged cache in a bucket."""
    if bucket_of(cache) is None:
        return
    for part in read_manifest(cache).parts:
        if part.in_other_cache:
            place = place_of(address_of(cache), part.path)
            raise ValueError(
                f"{cache}: a merged cache, whose part {place} lies in another cache. Verify the "
                "caches that it was merged from"
            )


def one_line(result: Verification) -> str:
    """The outcome in a line."""
    problems = len(result.structure.problems)
    rows = sum(len(content.rows) for content in result.content.values())
    wrong = [part for part, content in result.content.items() if not content.fine]
    if problems:
        return (
            f"{result.cache}: {problems:,} problems in its files; `verify --repair` may mend them"
        )
    if wrong:
        return f"{result.cache}: captured wrong in {', '.join(wrong)}"
    if result.unable:
        return f"{result.cache}: its files are as sealed, but not compared: {result.unable}"
    compared = f", and {rows:,} rows as the teacher gives them" if rows else ""
    return f"{result.cache}: fine, {result.structure.files:,} files as they were sealed{compared}"


def _repair(path: Path, teacher: str | None, *, fetch: bool, console: Console) -> list[Repair]:
    cache = open_cache(path)
    structure = check_structure(path, cache.manifest, console=console)
    return repair(cache, structure, teacher=teacher, fetch=fetch, memory=digest_memory())


def to_json(result: Verification) -> dict[str, Any]:
    """The whole result as the JSON document of `--json`."""

    def with_fine(measure: Figure | Count) -> dict[str, Any]:
        return dataclasses.asdict(measure) | {"fine": measure.fine}

    return {
        "cache": str(result.cache),
        "cache_id": result.cache_id,
        "status": result.status,
        "files": result.structure.files,
        "problems": [dataclasses.asdict(problem) for problem in result.structure.problems],
        "left_over": result.structure.left_over,
        "repairs": [dataclasses.asdict(repaired) for repaired in result.repairs],
        "unable": result.unable,
        "content": {
            part: {
                "rows": content.rows,
                "positions": content.positions,
                "cross_entropy": content.cross_entropy,
                "fine": content.fine,
                "figures": [with_fine(figure) for figure in content.figures],
                "counts": [with_fine(count) for count in content.counts],
            }
            for part, content in result.content.items()
        },
    }


def print_verification(result: Verification, console: Console) -> None:
    """Print repairs, problems of files and the comparison with the teacher."""
    for repaired in result.repairs:
        outcome = "repaired" if repaired.done else f"not repaired, {repaired.why}"
        console.print(f"{repaired.where}: {outcome}")
    structure = result.structure
    count = len(structure.problems)
    console.print(
        f"{result.cache}: {structure.files:,} files, "
        + (f"{count:,} problems" if count else "each as it was sealed")
    )
    if count:
        table = Table("unit", "signal", "file", "expected", "got", box=SIMPLE_HEAD)
        for problem in structure.problems[:_SHOWN]:
            unit = "" if problem.unit is None else str(problem.unit)
            table.add_row(unit, problem.signal, problem.file, problem.expected, problem.got)
        console.print(table)
    if count > _SHOWN:
        console.print(f"… and {count - _SHOWN:,} more: --json lists all")
    if structure.left_over:
        console.print(
            f"{len(structure.left_over):,} files of removed signals or unfinished additions: "
            f"`decant gc {result.cache}` deletes them"
        )
    for part, content in result.content.items():
        how = (
            "made again from the cache that it was aligned from"
            if math.isnan(content.cross_entropy)
            else "read again by the teacher, a document at a time (its own cross-entropy "
            f"{content.cross_entropy:.3f})"
        )
        console.print(f"{part}: {len(content.rows)} rows, {content.positions:,} positions {how}")
        console.print(_table(content))
        if not content.fine:
            console.print(
                "Values marked WRONG were captured wrong, not damaged later: --repair cannot mend "
                "them. Capture again into another directory."
            )


def _table(content: Content) -> Table:
    table = Table(*_COLUMNS, "", box=SIMPLE_HEAD)
    for figure in content.figures:
        limits = figure.allowed
        table.add_row(
            figure.signal,
            figure.what,
            *(f"{value:.2g}" for value in (figure.mean, figure.p99, figure.max)),
            "any" if limits == ANY else f"{limits.mean:.2g} / {limits.p99:.2g} / {limits.max:.2g}",
            "" if figure.fine else "WRONG",
        )
    for count in content.counts:
        ties = f", {count.ties} ties" if count.ties else ""
        table.add_row(
            count.signal,
            count.what,
            f"{count.wrong:,}",
            "",
            "",
            f"{count.most:,} of {count.of:,}{ties}",
            "" if count.fine else "WRONG",
        )
    return table
