"""Read the signals that are stored in records: `logits`, `counts` and `sketch`."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from decant.schemas import codecs
from decant.schemas.codecs import Tables
from decant.schemas.disk.frames import Kind, require_same_key
from decant.schemas.disk.layout import COUNTS, LOGITS, SKETCH
from decant.schemas.manifest.manifest import Manifest, Part
from decant.schemas.manifest.statistics import fetch_statistics, load_tables, table_hashes
from decant.schemas.reading.sketch_heads import SketchHeads
from decant.schemas.records.companion import (
    Companion,
    CompanionRecord,
    cut_sketch,
    decode_counts,
    decode_sketch,
    encode_counts,
    open_companion,
)
from decant.schemas.records.logits import (
    LogitsRecord,
    decode_logits,
    group_for_decoding,
    open_logits,
)
from decant.schemas.records.padded import (
    allocate_counts,
    allocate_sketch,
    allocate_targets,
    clear_targets,
    fill_companion,
    fill_targets,
)
from decant.schemas.signals import CountsSignal, SketchSignal
from decant.schemas.targets.counts import Counts
from decant.schemas.targets.targets import Targets
from decant.store.mirror import Mirror

DRAWS, LABELS = "draws", "labels"
"""Targets in a logits record beside the top-k and the tail's mass."""
COMPANIONS = {COUNTS: Kind.COUNTS, SKETCH: Kind.SKETCH}
"""Signals of the positions that `logits` scores, with the kind of their records."""

Records = Callable[[str], list[tuple[bytes, str]]]
"""The (record, its name in errors) of each row, by the signal's name."""


class RecordSignals:
    """Decodes records into the arrays of `Cache.read`."""

    def __init__(self, cache: Path, manifest: Manifest, mirror: Mirror | None = None):
        self._cache, self._mirror = cache, mirror
        self._manifest = manifest
        self._tables_of: dict[tuple[str, str], Tables] = {}
        self._fetched: dict[tuple[str, str], list[Future]] = {}
        self.heads = SketchHeads(cache, manifest, mirror)

    def allocate(
        self, n: int, names: Collection[str], *, targets: Collection[str]
    ) -> dict[str, np.ndarray]:
        """Uninitialised arrays for `n` rows of the signals `names`.

        `logits` has arrays of draws and labels only if `targets` names them.
        """
        length, parts = self._manifest.sequence_length, self._manifest.parts
        out: dict[str, np.ndarray] = {}
        if LOGITS in names:
            spec = self._manifest.logits
            spec = dataclasses.replace(
                spec,
                draws=spec.draws if DRAWS in targets else 0,
                labels=spec.labels and LABELS in targets,
            )
            out |= allocate_targets(n, length=length, spec=spec)
        if COUNTS in names:
            draws = max(_counts_of(part).draws for part in parts)
            out |= allocate_counts(n, length=length, draws=draws)
        if SKETCH in names:
            out |= allocate_sketch(n, length=length, rank=self.heads.rank)
            out["sketch_basis"] = np.zeros(n, np.int32)
        return out

    def fill(
        self,
        names: Collection[str],
        parts: Sequence[Part],
        keys: Sequence[bytes],
        records: Records,
        out: dict[str, np.ndarray],
    ) -> None:
        """Fill the arrays of the signals `names` in `out`, and clear unscored positions' loss mask.

        Draws and labels are decoded only if `out` has arrays for them. Row i belongs to `parts[i]`
        and has key `keys[i]`. In aligned parts, positions without a target stay scored: their label
        counts.
        """
        length = self._manifest.sequence_length
        left_out = [
            field
            for field, array in {codecs.DRAWS: "tail_ids", codecs.LABELS: "label_logprobs"}.items()
            if array not in out
        ]
        logits = [
            open_logits(record, where=where, length=length, spec=part.logits).without(left_out)
            for (record, where), part in zip(records(LOGITS), parts, strict=True)
        ]
        scored = np.zeros(out["loss_mask"].shape, bool)
        for slot, (record, key) in enumerate(zip(logits, keys, strict=True)):
            require_same_key(key, record.row_key, where=record.where)
            scored[slot] = record.scored
        with_label = np.array([part.aligned is not None for part in parts], bool)
        out["loss_mask"] &= scored | with_label[:, None]
        clear_targets(out, np.flatnonzero(~scored))
        companions = {
            name: self._open(COMPANIONS[name], records(name), logits, keys)
            for name in COMPANIONS
            if name in names
        }
        for part in {part.path: part for part in parts}.values():
            # By path, because parts of one directory share its tables.
            slots = [slot for slot, other in enumerate(parts) if other.path == part.path]
            if SKETCH in names:
                out["sketch_basis"][slots] = self.heads.number(part)
            for group in group_for_decoding([logits[slot] for slot in slots]):
                self._fill_group(names, part, [slots[i] for i in group], logits, companions, out)

    def _open(
        self,
        kind: Kind,
        records: list[tuple[bytes, str]],
        logits: Sequence[LogitsRecord],
        keys: Sequence[bytes],
    ) -> list[CompanionRecord]:
        opened = []
        for (data, where), of_logits, key in zip(records, logits, keys, strict=True):
            record = open_companion(data, kind=kind, where=where, scored=of_logits.positions)
            require_same_key(key, record.row_key, where=where)
            opened.append(record)
        return opened

    def _fill_group(
        self,
        names: Collection[str],
        part: Part,
        slots: list[int],
        logits: Sequence[LogitsRecord],
        companions: dict[str, list[CompanionRecord]],
        out: dict[str, np.ndarray],
    ) -> None:
        """Decode and fill the rows `slots`, whose logits records can be decoded together."""
        length = self._manifest.sequence_length
        of_slot = [slot * length + np.flatnonzero(logits[slot].scored) for slot in slots]
        places = np.concatenate(of_slot)
        targets = None
        if LOGITS in names or COUNTS in names:
            targets = decode_logits(
                [logits[slot] for slot in slots],
                tables=self.tables(part, LOGITS),
                vocabulary=self._manifest.vocabulary_size + part.logits.unmatched,
            )
        if LOGITS in names:
            assert targets is not None
            fill_targets(out, places, targets=targets, nodes=self._manifest.betas)
        for name, all_records in companions.items():
            records = [all_records[slot] for slot in slots if all_records[slot].positions]
            held = np.repeat(
                [all_records[slot].positions > 0 for slot in slots], [len(p) for p in of_slot]
            )
            clear_targets(out, places[~held], signals=(name,))
            if records:
                head = targets if targets is None or held.all() else targets[held]
                decoded = self.decode(name, part, records, head=head)
                fill_companion(out, places[held], decoded)

    def decode(
        self, name: str, part: Part, records: Sequence[CompanionRecord], *, head: Targets | None
    ) -> Companion:
        """What records of the signal `name` of a part hold; each record has positions.

        `head` are the targets of the same positions; `counts` needs them. ValueError naming the
        record or statistic that is damaged.
        """
        tables = self.tables(part, name)
        signal = part.signals[name]
        if isinstance(signal, SketchSignal):
            deviations = self.heads.deviations(part)
            return decode_sketch(
                records,
                signal=signal,
                deviations=deviations,
                tables=tables,
                length=self._manifest.sequence_length,
            )
        assert isinstance(signal, CountsSignal)
        assert head is not None
        vocabulary = self._manifest.vocabulary_size
        return decode_counts(
            records, draws=signal.draws, head=head, tables=tables, vocabulary=vocabulary
        )

    def cut(
        self,
        name: str,
        part: Part,
        record: CompanionRecord,
        kept: np.ndarray,
        *,
        row_key: bytes,
        heads: tuple[Targets, Targets],
    ) -> bytes:
        """The record of the positions `kept` (bool [n]) of a row alone, which keep every value.

        `row_key` is the row's new key. `heads` are its targets of all positions, and of those kept
        as their new record decodes.
        """
        tables, signal = self.tables(part, name), part.signals[name]
        before, after = heads
        if isinstance(signal, SketchSignal):
            deviations = self.heads.deviations(part)
            return cut_sketch(
                record,
                kept,
                row_key=row_key,
                signal=signal,
                deviations=deviations,
                tables=tables,
            )
        counts = self.decode(name, part, [record], head=before)
        assert isinstance(counts, Counts)
        return encode_counts(
            counts[kept],
            row_key=row_key,
            head=after,
            tables=tables,
            vocabulary=self._manifest.vocabulary_size,
        )

    def fetch_tables(self, names: Collection[str], parts: Iterable[Part]) -> list[Future]:
        """Begin to fetch what decoding the signals `names` needs beside records: all at once, not
        one after the other when it is needed. Returns what to wait for."""
        assert self._mirror is not None
        waiting: list[Future] = []
        for part in parts:
            for name in names:
                started = self._fetched.get((part.path, name))
                if started is None or any(map(_has_failed, started)):
                    root, files = (
                        self._cache / part.path,
                        table_hashes(part.statistics, signal=name),
                    )
                    if name == SKETCH:
                        files |= self.heads.files_of_deviations(part)
                    started = fetch_statistics(root, files, mirror=self._mirror)
                    self._fetched[part.path, name] = started
                waiting += (future for future in started if not future.done())
        return waiting

    def tables(self, part: Part, name: str) -> Tables:
        """The codec tables of a part's signal `name`."""
        if (part.path, name) not in self._tables_of:
            self._tables_of[part.path, name] = load_tables(
                self._cache / part.path,
                part.statistics,
                vocabulary=self._manifest.vocabulary_size + part.logits.unmatched,
                signal=name,
                mirror=self._mirror,
            )
        return self._tables_of[part.path, name]


def _has_failed(future: Future) -> bool:
    return future.cancelled() or (future.done() and future.exception() is not None)


def _counts_of(part: Part) -> CountsSignal:
    signal = part.signals[COUNTS]
    assert isinstance(signal, CountsSignal)
    return signal
