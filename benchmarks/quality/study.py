"""What the study consists of: captures, cells, and the config file of each.

A cell is a method at a temperature with a seed. Whatever the project's two commands can do is
done by them, from a TOML file that lies beside the cell's result; `dense`, `online` and `rs-kd`
have targets that no cache holds, and take everything else from such a file.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from decant.pipelines.config import Precompute
from decant.settings import parse
from decant.trainer.config import Train

Config = TypeVar("Config")
NEVER = 10**6
FIRST_SEED = 0
"""Its dense student and its times serve the others."""
ALPHA = 0.9
# Bytes a token that every method may spend: what `compact` takes for k = 32 (50 with tables from as
# small a corpus). Draws were chosen for about as many; the report prints what each really took.
DRAWS = 12

CAPTURES: dict[str, dict[str, Any]] = {
    "top32": {"k": 32, "profile": "compact", "draws": 0},
    "top16-draws": {
        "k": 16,
        "profile": "compact",
        "draws": DRAWS,
        "draw_temperatures": (1.0,),
    },
    # At a temperature draws have the least variance if its own tail is what they are drawn from.
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
"""The cache that cells without targets of their own take rows and their order from. Row numbers
are the same in all: they depend on the corpus alone."""


@dataclass(frozen=True)
class Study:
    """What all cells share."""

    work: Path
    teacher: str = "embedded"
    files: tuple[str, ...] = ("embedded",)
    max_bytes: int = 200_000
    """Of the corpus: about 53k tokens of the embedded one."""
    sequence_length: int = 256
    heldout: float = 0.2
    layers: int = 2
    updates: int = 56
    batch_rows: int = 2
    learning_rate: float = 1e-3
    """The same for every method; 24 updates on hard labels end alike at 1e-3 and 2e-3."""
    teacher_dtype: str = "bfloat16"
    student_dtype: str = "float32"
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Cell:
    """One student: what it learns from, at which temperature, over which order of rows."""

    method: str
    temperature: float
    seed: int
    capture: str = ROWS
    tail: str = "bucket"
    alpha: float = ALPHA

    @property
    def name(self) -> str:
        """`bucket-T2-seed0`: what its files are called."""
        return f"{self.method}-T{self.temperature:g}-seed{self.seed}"

    @property
    def cached(self) -> bool:
        """Whether its targets come from a cache, so that its TOML file alone says all of it."""
        return self.method not in ("dense", "online", "rs-kd")


def cells(study: Study) -> Iterator[Cell]:
    """All cells, the first seed of everything first."""
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
        # Last of its seed: how many updates it gets depends on times that the others took.
        yield Cell("online", 1.0, seed)


def precompute_config(study: Study, capture: str) -> Precompute:
    """The capture's settings, read from the TOML file that this writes."""
    settings = {
        "output": str(cache_path(study, capture)),
        "corpus": {
            "files": list(study.files),
            "max_bytes": study.max_bytes,
            "sequence_length": study.sequence_length,
            "heldout": study.heldout,
        },
        "teacher": {"model": study.teacher, "dtype": study.teacher_dtype},
        "signals": {"logits": CAPTURES[capture]},
    }
    path = study.work / "configs" / f"precompute-{capture}.toml"
    write_toml(path, settings, comment=f"decant precompute {path}")
    return _read(Precompute, path)


def train_config(study: Study, cell: Cell, *, updates: int | None = None) -> Train:
    """The cell's settings, read from the TOML file that this writes."""
    path = config_path(study, cell)
    settings = {
        "cache": str(cache_path(study, cell.capture)),
        "run": str(study.work / "runs" / cell.name),
        "dtype": study.student_dtype,
        # The study judges by itself, densely; a checkpoint is written at the end in any case.
        "checkpoint_every": NEVER,
        "evaluate_every": NEVER,
        "heldout_rows": study.batch_rows,
        "student": {"source": study.teacher, "layers": study.layers},
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
        else f"All of cell {cell.name} but its targets, which benchmarks/quality computes."
    )
    write_toml(path, settings, comment=comment)
    return _read(Train, path)


def _read(config_type: type[Config], path: Path) -> Config:
    """The settings as the commands read them; ValueError with their words if they refuse them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return parse(config_type, [str(path)], program="benchmarks.quality")
    except SystemExit:
        raise ValueError(f"{path}: refused:\n{said.getvalue()}") from None


def cache_path(study: Study, capture: str) -> Path:
    """Where a capture's cache is."""
    return study.work / "caches" / capture


def config_path(study: Study, cell: Cell) -> Path:
    """The cell's TOML file."""
    return study.work / "cells" / f"{cell.name}.toml"


def result_path(study: Study, cell: Cell) -> Path:
    """What came of the cell; exists when it is done."""
    return study.work / "cells" / f"{cell.name}.json"


def write_toml(path: Path, settings: dict[str, Any], *, comment: str) -> None:
    """Write nested settings of numbers, strings and lists, one level of tables at a time."""
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
