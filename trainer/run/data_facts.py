"""`data.json`: ids, sizes and places of a run's caches, readable without the caches.

Model cards and reports show them. `run.json` (`binding.py`) decides whether a run may continue;
nothing depends on `data.json`, which may change when a cache gains signals or rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decant.schemas import Cache
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.manifest.manifest import SPLITS
from decant.store import is_url

FILE = "data.json"


def cache_facts(cache: Cache, *, signals: Sequence[str] = ()) -> dict[str, Any]:
    """Ids and sizes of a cache's rows, of `logits` and of `signals`; it contains no path.

    `bytes_per_token` is a signal's file bytes divided by the number of positions with targets.
    """
    manifest = cache.manifest
    units = [unit for part in manifest.parts for unit in part.units]
    scored = sum(unit.scored for unit in units)
    logits = manifest.signals.get("logits")  # None: the cache holds rows only
    read = [name for name in ("logits", *signals) if name in manifest.signals]
    names = ("rows", *read)
    sizes = {name: sum(unit.files[name].bytes for unit in units) for name in names}
    splits = {
        split: {
            "rows": sum(unit.rows for unit in units if unit.split == split),
            "tokens": sum(unit.tokens for unit in units if unit.split == split),
            "targets": sum(unit.scored for unit in units if unit.split == split),
        }
        for split in SPLITS
    }
    return {
        "cache_id": manifest.cache_id,
        "teacher_id": logits.teacher_id if logits else None,
        "rows_id": manifest.rows_id,
        "tokenizer": manifest.tokenizer,
        "sequence_length": manifest.sequence_length,
        "vocabulary_size": manifest.vocabulary_size,
        "sources": sum(len(part.sources) for part in manifest.parts),
        **splits,
        "signal_ids": {name: manifest.signals[name].signal_id for name in read},
        "logits": {name: getattr(logits, name, None) for name in ("profile", "k", "draws")},
        "bytes_per_token": {name: size / max(scored, 1) for name, size in sizes.items()},
    }


def write_data_facts(run: Path, caches: Sequence[Cache], *, signals: Sequence[str] = ()) -> None:
    """Write the facts and the path of each cache, the main cache first, into a run's directory.

    Paths are relative to the run, so that runs and caches can be moved together.
    """
    facts = [
        {**cache_facts(cache, signals=signals), "path": _place(cache, run)} for cache in caches
    ]
    write_json(run / FILE, {"caches": facts})


def read_data_facts(run: Path) -> list[dict[str, Any]]:
    """The facts of each cache that a run reads; empty if a release before 0.5 began the run."""
    return read_json(run / FILE, holds="caches")["caches"] if (run / FILE).exists() else []


def main_cache(run: Path) -> str | Path | None:
    """Path or address of the main cache that a run learns from.

    None if a release before 0.8 began the run.
    """
    for facts in read_data_facts(run)[:1]:
        if "path" in facts:
            if is_url(facts["path"]):
                return facts["path"]
            return Path(os.path.relpath(run.resolve() / facts["path"]))
    return None


def _place(cache: Cache, run: Path) -> str:
    if cache.mirror:
        return cache.address
    return Path(os.path.relpath(cache.path.resolve(), run.resolve())).as_posix()
