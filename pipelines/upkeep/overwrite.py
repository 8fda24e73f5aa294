"""Overwrites forgotten documents: their units are written again in a staging directory, then moved.

A unit's files must match each other and the manifest, so a journal (`journal.py`) makes the
exchange atomic. In a bucket the swap of the manifest does.

Only forgotten positions change. The other targets of the same rows are encoded again from the same
levels, so that they decode to the same bits. Statistics stay, as they are sums over many documents.
The canary targets, of eight rows, leave the manifest if a canary row's unit is written again; `gc`
then deletes their files.
"""

import dataclasses
from collections.abc import Container, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from decant.pipelines.upkeep.journal import new_staging_folder, settle, write_journal
from decant.progress import Count, progress
from decant.schemas.arrays.reader import ArrayReader
from decant.schemas.arrays.spec import specs_of
from decant.schemas.arrays.writer import ArrayWriter
from decant.schemas.disk import steps
from decant.schemas.disk.array_record import FileEntry, RecordReaders, write_records
from decant.schemas.disk.inside import read_regular
from decant.schemas.disk.layout import LOGITS, RECORDS, ROWS, PartLayout
from decant.schemas.disk.shards import Shard
from decant.schemas.disk.stand_in import again_if_damaged, bucket_of, exists
from decant.schemas.disk.steps import Step
from decant.schemas.manifest.commits import (
    Commit,
    sealed_commit,
    summarise_shards,
    write_commit_again,
)
from decant.schemas.manifest.manifest import Manifest, Part, Unit, read_manifest, write_manifest
from decant.schemas.manifest.plan import CANARY, read_plan
from decant.schemas.reading.forgetting import ForgottenDocuments, erase
from decant.schemas.reading.record_signals import COMPANIONS, RecordSignals
from decant.schemas.reading.remote import open_remote
from decant.schemas.reading.units import read_unit_rows
from decant.schemas.records.companion import open_companion
from decant.schemas.records.logits import decode_logits, encode_logits, open_logits
from decant.schemas.records.rows import Row, encode_row
from decant.schemas.signals import ArraySignal, RecordSignal


def overwrite_forgotten(
    cache: Path,
    *,
    dry_run: bool = False,
    busy: Container[str] = (),
    console: Console | None = None,
) -> int:
    """Write every unit that holds forgotten tokens again, without them.

    Parts whose path is in `busy` are left as they are. Returns the number of units written;
    `dry_run` only counts them. Progress goes to `console`. Otherwise the caller must hold the
    cache's change lock, and no journal may be in the cache.
    """
    manifest = read_manifest(cache)
    overwrites = {
        number: _PartOverwrite(cache, manifest, part)
        for number, part in enumerate(manifest.parts)
        if part.forgotten and not part.in_other_cache and part.path not in busy
    }
    count = sum(len(overwrite.units) for overwrite in overwrites.values())
    if count and not dry_run:
        # In a bucket new files have new names, so the manifest alone decides which are read.
        in_bucket, parts = bucket_of(cache) is not None, list(manifest.parts)
        staged = Path() if in_bucket else new_staging_folder(cache)
        with progress("gc: overwrite", total=count, unit="units", console=console) as written:
            for number, overwrite in overwrites.items():
                parts[number] = overwrite.run(staged, written)
        new = dataclasses.replace(manifest, parts=tuple(parts))
        if in_bucket:
            write_manifest(cache, new, replaces=manifest.cache_id)
            steps.reached(Step.OVERWRITTEN)
        else:
            write_journal(cache, staged, new)
            settle(cache)
    return count


class _PartOverwrite:
    """Writes the units of one part that hold forgotten tokens to the staging directory."""

    def __init__(self, cache: Path, manifest: Manifest, part: Part):
        self.cache = cache
        self.part = part
        self.layout = self.staged = PartLayout(cache / part.path)
        self.length = manifest.sequence_length
        self.vocabulary = manifest.vocabulary_size
        self.forgetting = ForgottenDocuments(part)
        bucket = bucket_of(cache)
        # Arrays are read as by a reader of the sealed cache.
        self.mirror = open_remote(bucket.url, place=None, most_bytes=None)[2] if bucket else None
        self.reader = RecordSignals(cache, manifest)
        self.units = {
            number: unit
            for number, unit in part.numbered_units
            if self._holds_forgotten(number, unit)
        }
        """Units that hold forgotten tokens, by number."""

    def _holds_forgotten(self, number: int, unit: Unit) -> bool:
        rows = read_unit_rows(self.layout.root, number, unit, length=self.length)
        return any(self._erased(row) is not row for row in rows)

    def _erased(self, row: Row) -> Row:
        """The row with its forgotten tokens and their targets erased; `row` itself if it has none.

        Segments and their origins stay, so that readers still know which positions are forgotten.
        """
        gone = self.forgetting.positions(row)
        if not (row.tokens[gone].any() or row.loss_mask[gone].any()):
            return row
        tokens, mask = np.where(gone, 0, row.tokens), row.loss_mask & ~gone
        # Log-probabilities of positions without a target are not written.
        return dataclasses.replace(row, tokens=tokens.astype(np.int32), loss_mask=mask)

    def run(self, staged: Path, written: Count) -> Part:
        """Write the new files to the folder `staged`, below the cache; returns the new part.

        Each unit is added to `written`.
        """
        self.staged = PartLayout(self.cache / staged / self.part.path)
        units = []
        for number, unit in self.part.numbered_units:
            if number in self.units:
                unit = self._write_unit(number, unit)
                written.add(1)
            units.append(unit)
        plan = self.layout.plan
        # A cache of rows without a teacher has no plan.
        canaries = {unit for unit, _ in read_plan(plan).canary} if exists(plan) else set()
        statistics = self.part.statistics
        if canaries & self.units.keys():
            statistics = {n: sha for n, sha in statistics.items() if not n.startswith(CANARY)}
        return dataclasses.replace(self.part, units=tuple(units), statistics=statistics)

    def _write_unit(self, number: int, unit: Unit) -> Unit:
        before = read_unit_rows(self.layout.root, number, unit, length=self.length)
        after = [self._erased(row) for row in before]
        records = [encode_row(row) for row in after]
        files = {ROWS: write_records(self.staged.records(ROWS, number), records)}
        files |= self._write_records(number, unit, before, after)
        for name, signal in self.part.signals.items():
            commit = self._sealed_commit(name, number, unit)
            if isinstance(signal, RecordSignal):
                commit = dataclasses.replace(commit, file=files[name])
            else:
                shards = self._write_arrays(name, signal, number, before, commit.shards)
                files[name] = summarise_shards(shards, rows=unit.rows)
                commit = dataclasses.replace(commit, file=files[name], shards=shards)
            write_commit_again(self.staged.root, name, commit)
        scored = int(sum(row.loss_mask.sum() for row in after))
        return dataclasses.replace(unit, scored=scored, files=files)

    def _sealed_commit(self, name: str, number: int, unit: Unit) -> Commit:
        in_bucket = self.mirror is not None
        commit, *_ = sealed_commit(
            self.layout, name, number, unit.files[name], read_regular, by_content=in_bucket
        )
        return commit

    def _write_records(
        self, number: int, unit: Unit, before: Sequence[Row], after: Sequence[Row]
    ) -> dict[str, FileEntry]:
        names = [name for name in RECORDS if name in self.part.signals]
        stored = {
            name: RecordReaders().read(
                self.layout.records(name, number), range(unit.rows), expected=unit.files[name]
            )
            for name in names
        }
        of_rows = zip(*stored.values(), before, after, strict=True)
        new = [
            old if now is was else self._write_row(dict(zip(names, old, strict=True)), now)
            for *old, was, now in of_rows
        ]
        return {
            name: write_records(self.staged.records(name, number), records)
            for name, records in zip(names, zip(*new, strict=True), strict=True)
        }

    def _write_row(self, stored: Mapping[str, bytes], row: Row) -> list[bytes]:
        """The records of a row with targets only where `row` still has them, in this order."""
        where = f"{self.layout.root}, a row with forgotten documents"
        signal = self.part.logits
        shape = {
            "tables": self.reader.tables(self.part, LOGITS),
            "vocabulary": self.vocabulary + signal.unmatched,
        }
        opened = open_logits(stored[LOGITS], where=where, length=self.length, spec=signal)
        levels = decode_logits([opened], normalised=False, **shape)
        scored = opened.scored & row.loss_mask
        kept = scored[opened.scored]
        logits = encode_logits(
            levels[kept],
            row_key=row.key,
            scored=scored,
            profile=signal.profile,
            **shape,
        )
        # Counts are coded together with the head, as a reader of the new record decodes it.
        again = open_logits(logits, where=where, length=self.length, spec=signal)
        heads = (
            decode_logits([opened], **shape),
            decode_logits([again], **shape),
        )
        records = [logits]
        for name, data in stored.items():
            if name == LOGITS:
                continue
            record = open_companion(
                data, kind=COMPANIONS[name], where=where, scored=opened.positions
            )
            if record.positions:
                data = self.reader.cut(name, self.part, record, kept, row_key=row.key, heads=heads)
            records.append(data)
        return records

    def _write_arrays(
        self,
        name: str,
        signal: ArraySignal,
        number: int,
        rows: Sequence[Row],
        committed: Mapping[str, tuple[Shard, ...]],
    ) -> dict[str, tuple[Shard, ...]]:
        first, shards = number * self.part.unit_rows, {}
        files = self.mirror.files / self.part.path if self.mirror else self.layout.root
        specs = specs_of(signal, name=name, slots=self.part.slots, sequence_length=self.length)
        for array, spec in specs.items():
            reader = ArrayReader(
                PartLayout(files).array(array),
                spec,
                name=array,
                unit_rows=self.part.unit_rows,
                committed=lambda _, array=array: committed[array],
                mirror=self.mirror,
            )
            writer = ArrayWriter(self.staged.array(array), spec, first=first)
            for offset, row in enumerate(rows):
                (stored,) = again_if_damaged(
                    partial(reader.read, [first + offset]),
                    partial(reader.forget, np.array([first + offset])),
                )
                out = {array: stored[None]}
                erase(out, 0, self.forgetting.positions(row), signals=[array])
                writer.append(stored)
            shards[array] = writer.finish()
        return shards
