"""Targets in a cache: its manifest, plans and commits, its record files and records.

Checksums are made right before each reading; otherwise nothing behind them would be fuzzed.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from decant.pipelines.upkeep.journal import settle
from decant.schemas.codecs import Tables, fit
from decant.schemas.disk.array_record import FileEntry, as_json, write_records
from decant.schemas.disk.atomic import write_json
from decant.schemas.disk.record_file import RecordFile
from decant.schemas.manifest.commits import Commit, Shard, load_commit
from decant.schemas.manifest.manifest import (
    Forgotten,
    Manifest,
    Part,
    Source,
    Unit,
    manifest_to_json,
    read_manifest,
)
from decant.schemas.manifest.plan import Plan, PlannedRows, PlannedTeacher, read_plan
from decant.schemas.reading.cache import Cache
from decant.schemas.records.logits import decode_logits, encode_logits, open_logits
from decant.schemas.records.rows import Segment, build_row, decode_row, encode_row
from decant.schemas.signals import (
    AttentionSignal,
    CountsSignal,
    HiddenSignal,
    LogitsSignal,
    SketchSignal,
    TargetSpec,
)
from tests.formulas import sampling
from tests.fuzzing.target import Target, right_crc
from tests.schemas.codecs.test_codecs import zipf_logits

_ID = "0123456789abcdef" * 4
_LENGTH, _VOCABULARY, _SPEC = 24, 300, TargetSpec(k=8, draws=3, draw_betas=(1.0,))
_ENTRY = FileEntry(131072, _ID, 3, "0123456789abcdef")
_UNIT = Unit("train", 3, 70, 60, {"rows": _ENTRY, "logits": _ENTRY, "hidden/1": _ENTRY}, (1,))
_SIGNALS = {
    "logits": LogitsSignal(8, 3, (1.0,), signal_id=_ID, teacher_id=_ID, profile="compact"),
    "hidden/1": HiddenSignal(_ID, _ID, 1, "int8", 6, 32, 2, "directions-1.npy", 0.6),
    "attention/0": AttentionSignal(_ID, _ID, 0, "uint8-log", (0, 2), 4, 2),
    "counts": CountsSignal(_ID, _ID, 50),
    "sketch": SketchSignal(_ID, _ID, 8, 32, 0.5, True, 30.0),
}
_STATISTICS = {"directions-1.npy": _ID}


def manifests(_: Path) -> list[bytes]:
    unit = dataclasses.replace(_UNIT, files=dict.fromkeys(("rows", *_SIGNALS), _ENTRY))
    part = Part("parts/0000", _ID, 4, (unit, unit), _SIGNALS, _STATISTICS, (Source("a.txt", _ID),))
    forgetful = dataclasses.replace(
        part,
        numbers=(0, 3),
        planned_units=5,
        forgotten=(Forgotten(0, 17), Forgotten(0)),
        forgotten_rows=((3, 1),),
    )
    return [
        json.dumps(manifest_to_json(Manifest(_LENGTH, _VOCABULARY, _ID, (one,)))).encode()
        for one in (part, forgetful)
    ]


def _checksummed(path: Path) -> bool:
    """Give the JSON in `path` a right checksum; False if it is no object."""
    value: Any = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        return False
    write_json(path, value)
    return True


def read_a_manifest(path: Path) -> None:
    if _checksummed(path):
        cache = Cache(path.parent, read_manifest(path.parent))
        cache.rows("train")
        repr((cache.manifest.signals, cache.manifest.rows_id))


def plans(_: Path) -> list[bytes]:
    teacher = PlannedTeacher("teacher", _ID, "float32", _VOCABULARY, _LENGTH, 2)
    unit = dataclasses.replace(_UNIT, files={"rows": _ENTRY}, skipped_rows=())
    rows = PlannedRows(_ID, 4, (unit, unit), (Source("a.txt", _ID),), (), 0, ((0, 1), (1, 2)))
    plan = Plan(_ID, rows, teacher, dict(_SIGNALS), _STATISTICS, ((0, 1),), "fail")
    return [json.dumps(as_json(plan)).encode()]


def read_a_plan(path: Path) -> None:
    if _checksummed(path):
        plan = read_plan(path)
        for name in plan.arrays:
            plan.specs(name)


def commits(_: Path) -> list[bytes]:
    shards = {"hidden/1": (Shard("c.0.0.0", 9, _ID, _ID),)}
    whole = Commit(0, _ID, _ENTRY, {"jax": "1"}, (1,), 2, shards)
    return [json.dumps(as_json(whole)).encode()]


def read_a_commit(path: Path) -> None:
    if _checksummed(path):
        load_commit(path)


def journals(_: Path) -> list[bytes]:
    """Of `gc`s that write all units again, as this release notes it and as older ones did."""
    values = [json.loads(manifest) for manifest in manifests(_)]
    return [
        json.dumps({"manifest": value, **how}).encode()
        for value in values
        for how in ({"staged": "0123456789abcdef"}, {"moves": ["parts/0000/rows/unit-00000"]})
    ]


def read_a_journal(path: Path) -> None:
    for name, value in (("manifest.json", manifests(path)[0]), (path.name, path.read_bytes())):
        path.with_name(name).write_bytes(value)
        if not _checksummed(path.with_name(name)):
            return
    settle(path.parent)


def record_files(directory: Path) -> list[bytes]:
    path = directory / "file"
    write_records(path, [b"", b"abc", bytes(300), b"x" * 70_000])
    return [path.read_bytes()]


def read_a_record_file(path: Path) -> None:
    file = RecordFile(path)
    for number in range(len(file)):
        file.read(number)


def rows(_: Path) -> list[bytes]:
    tokens = np.arange(20, dtype=np.int32) * 7
    segments = [
        Segment(tokens[:12], tokens[:12] % 2 == 0, 0, 0, 0),
        Segment(tokens[12:] << 13, np.ones(8, bool), 1, 1 << 40, 3),
    ]
    return [encode_row(build_row(segments, length=_LENGTH))]


def read_a_row(path: Path) -> None:
    decode_row(right_crc(path.read_bytes()), where="record", length=_LENGTH)


def _tables(profile) -> Tables:
    return fit(profile, _targets(200), vocabulary=_VOCABULARY)


def _targets(n: int):
    starts = np.random.default_rng(0).random(n)
    return sampling.with_draws(
        zipf_logits(n, _VOCABULARY), starts, k=_SPEC.k, m=_SPEC.draws, betas=_SPEC.draw_betas
    )


_TABLES = {profile: _tables(profile) for profile in ("lossless", "fast", "compact")}


def logits(_: Path) -> list[bytes]:
    return [
        encode_logits(
            _targets(_LENGTH - 4),
            row_key=bytes(16),
            scored=np.arange(_LENGTH) >= 4,
            profile=profile,
            tables=tables,
            vocabulary=_VOCABULARY,
        )
        for profile, tables in _TABLES.items()
    ]


def read_logits(path: Path) -> None:
    data = right_crc(path.read_bytes())
    opened = open_logits(data, where="record", length=_LENGTH, spec=_SPEC)
    if opened.positions:
        targets = decode_logits([opened], tables=_TABLES["compact"], vocabulary=_VOCABULARY)
        assert targets.ids.min() >= 0
        assert targets.ids.max() < _VOCABULARY
        assert not np.isnan(targets.logprobs).any()
        assert targets.logprobs.max() < 0.2


CACHE_TARGETS = {
    "manifest": Target("manifest.json", manifests, read_a_manifest, is_json=True),
    "plan": Target("plan.json", plans, read_a_plan, is_json=True),
    "commit": Target("commit.json", commits, read_a_commit, is_json=True),
    "journal": Target("gc.json", journals, read_a_journal, is_json=True),
    "record-file": Target("unit-00000.array_record", record_files, read_a_record_file),
    "row": Target("row", rows, read_a_row),
    "logits": Target("logits", logits, read_logits),
}
