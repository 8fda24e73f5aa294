"""`data.json`: what a run learned from, for people who have the run and not the cache.

Beside `run.json`, which decides whether a run may go on, this is for model cards and reports: it
may change when the cache gains signals or rows, and nothing depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decant.schemas import Cache
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.manifest.manifest import SPLITS

FILE = "data.json"


def facts(cache: Cache, *, signals: Sequence[str] = ()) -> dict[str, Any]:
    """Names and sizes of a cache's rows, and of `logits` and these signals; no path in it.

    `bytes_per_token` is by the positions with targets, everything included.
    """
    manifest = cache.manifest
    units = [unit for part in manifest.parts for unit in part.units]
    scored = sum(unit.scored for unit in units)
    logits = manifest.signals.get("logits")  # text alone has none
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


def record_facts(run: Path, caches: Sequence[dict[str, Any]]) -> None:
    """Write them into a run's directory."""
    write_json(run / FILE, {"caches": list(caches)})


def recorded_facts(run: Path) -> list[dict[str, Any]]:
    """Of each cache that a run reads; none if it began before there was this file."""
    return read_json(run / FILE)["caches"] if (run / FILE).exists() else []
