"""The study's captures and cells, and the config file of each.

A cell is a method at a temperature with a seed. Captures and most cells are run by `precompute` and
`train` from a TOML file beside the cell's result. `dense`, `online` and `rs-kd` have targets that
no cache holds; their other settings come from such a file too.
"""

from __future__ import annotations

import contextlib
import io
import json
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
# Every method may spend about the bytes a token that `compact` takes for k = 32 (50 with tables of
# such a small corpus). The number of draws is chosen for that; the report prints the real bytes.
DRAWS = 12

CAPTURES: dict[str, dict[str, Any]] = {
    "top32": {"k": 32, "profile": "compact", "draws": 0},
    "top16-draws": {
        "k": 16,
        "profile": "compact",
        "draws": DRAWS,
        "draw_temperatures": (1.0,),
    },
    # Draws have the least variance at T if they are drawn from the tail at T.
    "top16-draws-T2": {
        "k": 16,
        "profile": "compact",
        "draws": DRAWS,
        "draw_temperatures": (2.0,),
    },
    "top16-draws-T4": {
        "k": 16,
        "profile": "compact",
        "draws": DRAWS,
        "draw_temperatures": (4.0,),
    },
}
"""`signals.logits` of each cache that the cells train from."""

ROWS = "top32"
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
    teacher_dtype: str = "bfloat16"
    student_dtype: str = "float32"
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Cell:
    """One student: its method, its temperature, and the seed of its order of rows."""

    method: str
    temperature: float
    seed: int
    capture: str = ROWS
    tail: str = "bucket"
    alpha: float = ALPHA

    @property
    def name(self) -> str:
        """Name of the cell's files: `bucket-T2-seed0`."""
        return f"{self.method}-T{self.temperature:g}-seed{self.seed}"

    @property
    def cached(self) -> bool:
        """Whether its targets come from a cache, so that `train` with its TOML file runs it."""
        return self.method not in ("dense", "online", "rs-kd")


def cells(study: Study) -> Iterator[Cell]:
    """All cells, seed by seed."""
    for seed in study.seeds:
        yield Cell("ce", 1.0, seed, alpha=0.0)
        for temperature in (1.0, 2.0, 4.0):
            yield Cell("dense", temperature, seed)
            yield Cell("bucket", temperature, seed)
            yield Cell("renormalize", temperature, seed, tail="renormalize")
            yield Cell("prior", temperature, seed, tail="prior")
        yield Cell("sampled", 1.0, seed, capture="top16-draws", tail="sampled")
        yield Cell("sampled", 2.0, seed, capture="top16-draws-T2", tail="sampled")
        yield Cell("sampled", 4.0, seed, capture="top16-draws-T4", tail="sampled")
        yield Cell("rs-kd", 1.0, seed, tail="renormalize")
        # Last of its seed, because its number of updates depends on other cells' times.
        yield Cell("online", 1.0, seed)


def precompute_config(study: Study, capture: str) -> Precompute:
    """Write the capture's TOML file and read its settings from it."""
    settings = {
        "output": str(cache_path(study, capture).absolute()),
        "corpus": {
            "files": [_place(name) for name in study.files],
            "max_bytes": study.max_bytes,
            "sequence_length": study.sequence_length,
            "heldout": study.heldout,
        },
        "teacher": {"model": _place(study.teacher), "dtype": study.teacher_dtype},
        "signals": {"logits": CAPTURES[capture]},
    }
    path = study.work / "configs" / f"precompute-{capture}.toml"
    write_toml(path, settings, comment=f"decant precompute {path}")
    return _read(Precompute, path)


def train_config(study: Study, cell: Cell, *, updates: int | None = None) -> Train:
    """Write the cell's TOML file and read its settings from it."""
    path = config_path(study, cell)
    settings = {
        "cache": str(cache_path(study, cell.capture).absolute()),
        "run": str((study.work / "runs" / cell.name).absolute()),
        "dtype": study.student_dtype,
        # The study measures held-out rows itself. The last checkpoint is written in any case.
        "checkpoint_every": NEVER,
        "evaluate_every": NEVER,
        "heldout_rows": study.batch_rows,
        "student": {"source": _place(study.teacher), "layers": study.layers},
        "data": {
            "batch_rows": study.batch_rows,
            "steps": updates or study.updates,
            "seed": cell.seed,
        },
        "loss": {"alpha": cell.alpha, "temperature": cell.temperature, "tail": cell.tail},
        "optimiser": {"learning_rate": study.learning_rate},
    }
    comment = (
        f"decant train {path}"
        if cell.cached
        else f"Settings of cell {cell.name}; benchmarks/quality computes its targets."
    )
    write_toml(path, settings, comment=comment)
    return _read(Train, path)


def _place(name: str) -> str:
    """A path that means the same in a config file elsewhere; a hub id or word as it is."""
    folder = Path(name.partition("*")[0])
    return str(Path(name).absolute()) if folder.exists() and folder.parts else name


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
    return study.work / "cells" / f"{cell.name}.json"


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
