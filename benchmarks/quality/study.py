"""The study's captures and cells, and the config file of each.

A cell is a method at a temperature, with a size of its targets and a seed. Captures and most cells
are run by `precompute` and `train` from a TOML file in the study's directory. `dense`, `online`,
`rs-kd` and `fresh` have targets that no cache holds; their other settings come from such a file
too.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from decant.command_line.settings import parse
from decant.pipelines.config import Precompute
from decant.trainer.config import Train

Config = TypeVar("Config")
NEVER = 10**6
FIRST_SEED = 0
"""The seed whose dense student and times the other cells use."""
ALPHA = 0.9
TEMPERATURES = (1.0, 2.0, 4.0)
SIZES = (16, 32, 64, 120)
"""Bytes a token that a cell's targets may take, about. The report prints the real bytes."""

# The settings that take about these bytes of real text, found by trying.
_TOP_K = {16: 9, 32: 20, 64: 42, 120: 84}
_TOP_K_AND_DRAWS = {16: (4, 4), 32: (8, 8), 64: (16, 18), 120: (32, 32)}
_COUNTS = {14: 24, 28: 78, 45: 176, 64: 280, 120: 640}
_RS_KD = {14: 24, 28: 66, 45: 140, 120: 512}
_FRESH = {size: _COUNTS[size] for size in (14, 28)}
_TOP_K_AND_SKETCH = {16: (2, 20), 37: (8, 40), 60: (8, 100), 120: (24, 192)}
_TOP_K_AND_DITHERED = {14: (1, 32), 37: (2, 192), 41: (2, 256)}


def _exact(rank: int) -> dict[str, Any]:
    """A sketch in fine steps, the default until 0.14."""
    return {"rank": rank, "step": 1.0, "dither": False}


NONE: dict[str, Any] = {"draws": 0, "counts": 0, "sketch": {"rank": 0}}
CAPTURES: dict[str, dict[str, Any]] = {
    # One record for every temperature: the default capture of releases 0.12 to 0.14, and today's.
    "record": {"k": 8, "draws": 0, "counts": 100, "sketch": _exact(64)},
    "dithered": {"k": 8, "draws": 0, "counts": 100, "sketch": {"rank": 256}},
    **{f"top-{k}": {**NONE, "k": k} for k in _TOP_K.values()},
    # Draws have the least variance at T if they are drawn from the tail at T.
    **{
        f"top-{k}-draws-{m}-T{T:g}": {**NONE, "k": k, "draws": m, "draw_temperatures": [T]}
        for k, m in _TOP_K_AND_DRAWS.values()
        for T in TEMPERATURES
    },
    **{f"counts-{n}": {**NONE, "k": 0, "counts": n} for n in _COUNTS.values()},
    **{
        f"top-{k}-sketch-{r}": {**NONE, "k": k, "sketch": _exact(r)}
        for k, r in _TOP_K_AND_SKETCH.values()
    },
    **{
        f"top-{k}-dithered-{r}": {**NONE, "k": k, "sketch": {"rank": r}}
        for k, r in _TOP_K_AND_DITHERED.values()
    },
}
"""`signals.logits` of each cache that the cells train from."""

ROWS = "record"
"""The cache whose rows, in their order, are used by cells without a cache of their own. Row numbers
are the same in all caches, because they depend on the corpus alone."""


@dataclass(frozen=True)
class Study:
    """Settings that all cells share."""

    work: Path
    teacher: str = "embedded"
    files: tuple[str, ...] = ("embedded",)
    max_bytes: int = 200_000
    """Bytes of the corpus; the default is about 53k tokens of the embedded one."""
    sequence_length: int = 256
    heldout: float = 0.2
    layers: int = 2
    updates: int = 56
    batch_rows: int = 2
    learning_rate: float = 1e-3
    """For every method. After 24 updates on hard labels 1e-3 and 2e-3 give the same result."""
    teacher_dtype: str = "float32"
    student_dtype: str = "float32"
    seeds: tuple[int, ...] = (0, 1, 2)
    results: Path | None = None
    """Directory of the results; None: in `work`."""

    @property
    def results_path(self) -> Path:
        """Directory of the results, which are small; `work` holds gigabytes."""
        return self.results or self.work


@dataclass(frozen=True)
class Cell:
    """One student: its targets, its temperature, and the seed of its order of rows."""

    method: str
    temperature: float
    seed: int
    size: int | None = None
    """One of a method's sizes, about the bytes a token of its targets; None: it has one."""
    capture: str = ROWS
    tail: str | None = None
    alpha: float = ALPHA
    draws: int = 0
    """N of `rs-kd` and `fresh`, whose counts no cache holds."""

    @property
    def name(self) -> str:
        """Name of the cell's files: `bucket-32-T2-seed0`."""
        size = "" if self.size is None else f"-{self.size}"
        return f"{self.method}{size}-T{self.temperature:g}-seed{self.seed}"

    @property
    def cached(self) -> bool:
        """Whether its targets come from a cache, so that `train` with its TOML file runs it."""
        return self.method not in ("dense", "online", "rs-kd", "fresh")


def cells(study: Study) -> Iterator[Cell]:
    """All cells, seed by seed."""
    for seed in study.seeds:
        yield Cell("ce", 1.0, seed, alpha=0.0)
        for temperature in TEMPERATURES:
            yield Cell("dense", temperature, seed)
            # Both have the same counts.
            record, dithered = ("counts", "sketch") if temperature == 1 else (None, None)
            yield Cell("record", temperature, seed, tail=record)
            yield Cell("dithered", temperature, seed, capture="dithered", tail=dithered)
            for size, (k, r) in _TOP_K_AND_DITHERED.items():
                yield Cell("dithered", temperature, seed, size, f"top-{k}-dithered-{r}")
            yield from _sketch_cells(temperature, seed)
            if temperature == 1:
                yield from _count_cells(seed)
            yield from _older_cells(temperature, seed)
        # Last of its seed, because its number of updates depends on other cells' times.
        yield Cell("online", 1.0, seed)


def _count_cells(seed: int) -> Iterator[Cell]:
    for size, n in _COUNTS.items():
        yield Cell("counts", 1.0, seed, size, f"counts-{n}", "counts")
    for size, n in _RS_KD.items():
        yield Cell("rs-kd", 1.0, seed, size, tail="counts", draws=n)
    for size, n in _FRESH.items():
        yield Cell("fresh", 1.0, seed, size, tail="counts", draws=n)


def _sketch_cells(temperature: float, seed: int) -> Iterator[Cell]:
    for size, (k, r) in _TOP_K_AND_SKETCH.items():
        yield Cell("sketch", temperature, seed, size, f"top-{k}-sketch-{r}", "sketch")


def _older_cells(temperature: float, seed: int) -> Iterator[Cell]:
    for size in SIZES:
        k, m = _TOP_K_AND_DRAWS[size]
        drawn = f"top-{k}-draws-{m}-T{temperature:g}"
        yield Cell("sampled", temperature, seed, size, drawn, "sampled")
        for tail in ("prior", "bucket", "renormalize"):
            yield Cell(tail, temperature, seed, size, f"top-{_TOP_K[size]}", tail)


def precompute_config(study: Study, capture: str) -> Precompute:
    """Write the capture's TOML file and read its settings from it."""
    path = study.work / "configs" / f"precompute-{capture}.toml"
    settings = {
        "output": _from(path, cache_path(study, capture)),
        "corpus": {
            "files": [_place(path, name) for name in study.files],
            "max_bytes": study.max_bytes,
            "sequence_length": study.sequence_length,
            "heldout": study.heldout,
        },
        "teacher": {"model": _place(path, study.teacher), "dtype": study.teacher_dtype},
        "signals": {"logits": CAPTURES[capture]},
    }
    write_toml(path, settings, comment=f"decant precompute {path.name}")
    return _read(Precompute, path)


def train_config(study: Study, cell: Cell, *, updates: int | None = None) -> Train:
    """Write the cell's TOML file and read its settings from it."""
    path = config_path(study, cell)
    settings = {
        "cache": _from(path, cache_path(study, cell.capture)),
        "run": _from(path, study.work / "runs" / cell.name),
        "dtype": study.student_dtype,
        # The study measures held-out rows itself. The last checkpoint is written in any case.
        "checkpoint_every": NEVER,
        "evaluate_every": NEVER,
        "heldout_rows": study.batch_rows,
        "student": {"source": _place(path, study.teacher), "layers": study.layers},
        "data": {
            "batch_rows": study.batch_rows,
            "steps": updates or study.updates,
            "seed": cell.seed,
        },
        "loss": {"alpha": cell.alpha, "temperature": cell.temperature},
        "optimiser": {"learning_rate": study.learning_rate},
    }
    if cell.tail:
        settings["loss"]["tail"] = cell.tail
    comment = (
        f"decant train {path.name}"
        if cell.cached
        else f"Settings of cell {cell.name}; benchmarks/quality computes its targets."
    )
    write_toml(path, settings, comment=comment)
    return _read(Train, path)


def _place(config: Path, name: str) -> str:
    """A path as the config file has to spell it; a hub id or word as it is."""
    folder = Path(name.partition("*")[0])
    return _from(config, Path(name)) if folder.exists() and folder.parts else name


def _from(config: Path, path: Path) -> str:
    """`path` relative to the directory of the file `config`, as paths in config files are."""
    return os.path.relpath(path.absolute(), config.absolute().parent)


def _read(config_type: type[Config], path: Path) -> Config:
    """The settings as a command reads them; ValueError with the command's message if it fails."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            return parse(config_type, [str(path)], program="benchmarks.quality")
    except SystemExit:
        raise ValueError(f"{path}: refused:\n{output.getvalue()}") from None


def cache_path(study: Study, capture: str) -> Path:
    """Directory of a capture's cache."""
    return study.work / "caches" / capture


def config_path(study: Study, cell: Cell) -> Path:
    """The cell's TOML file."""
    return study.work / "cells" / f"{cell.name}.toml"


def result_path(study: Study, cell: Cell) -> Path:
    """The cell's result file, which exists once the cell is done."""
    return study.results_path / "cells" / f"{cell.name}.json"


def write_toml(path: Path, settings: dict[str, Any], *, comment: str) -> None:
    """Write nested settings of numbers, strings and flat lists as TOML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {comment}\n" + "\n".join(_lines(settings, prefix="")) + "\n")


def _lines(settings: dict[str, Any], *, prefix: str) -> Iterator[str]:
    tables = {name: value for name, value in settings.items() if isinstance(value, dict)}
    for name, value in settings.items():
        if name not in tables:
            # JSON's strings, numbers, booleans and flat lists are TOML's.
            yield f"{name} = {json.dumps(value, ensure_ascii=False)}"
    for name, table in tables.items():
        if any(not isinstance(value, dict) for value in table.values()):
            yield f"\n[{prefix}{name}]"
        yield from _lines(table, prefix=f"{prefix}{name}.")
