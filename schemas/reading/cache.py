"""Opening a sealed cache and reading rows with their signals as padded numpy arrays."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from decant.schemas.codecs import Tables
from decant.schemas.disk.array_record import RecordReaders
from decant.schemas.disk.frames import require_same_key
from decant.schemas.disk.layout import LOGITS, ROWS, TOKENIZER, PartLayout
from decant.schemas.manifest.manifest import Manifest, Part, read_manifest
from decant.schemas.manifest.statistics import load_statistic, load_tables
from decant.schemas.reading.forgetting import Forgetting, erase
from decant.schemas.reading.merged_parts import refresh_parts
from decant.schemas.records.logits import (
    LogitsRecord,
    decode_logits,
    field_bytes,
    group_for_decoding,
    open_logits,
)
from decant.schemas.records.padded import allocate_targets, clear_targets, fill_targets
from decant.schemas.records.rows import decode_row
from decant.schemas.targets.prior import COUNTS, SUMS, TailPrior, log_prior

if TYPE_CHECKING:
    from decant.schemas.reading.signal_arrays import SignalArrays

ROW_FIELDS = ("tokens", "segment_ids", "positions", "loss_mask")


def open_cache(path: str | Path) -> "Cache":
    """Open the sealed cache at `path`, reading nothing but its manifest.

    Raises ValueError with the reason if it is unsealed, not a cache, of another format version,
    its manifest is damaged, or a part in another cache that it refers to is gone.
    """
    path = Path(path)
    return Cache(path, refresh_parts(path, read_manifest(path)))


class Cache:
    """A sealed cache. Row numbers run over parts and units, in the manifest's order."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        # All below is of this process: see __reduce__.
        self._readers = RecordReaders()
        self._paths: dict[tuple[int, str], Path] = {}
        self._tables_of: dict[str, Tables] = {}
        self._arrays: dict[str, SignalArrays] = {}
        self._units = [
            (part, *numbered) for part in manifest.parts for numbered in part.numbered_units
        ]
        counts = [unit.rows for _, _, unit in self._units]
        self._first_row = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._forgotten = {part.path: Forgetting(part) for part in manifest.parts if part.forgotten}

    def __reduce__(self) -> tuple:
        # Worker processes get the manifest and open files of their own, as they need them.
        return type(self), (self.path, self.manifest)

    def __len__(self) -> int:
        return int(self._first_row[-1])

    @property
    def tokenizer_path(self) -> Path:
        """Directory with the tokenizer, its chat template and the teacher's config."""
        return self.path / TOKENIZER

    def rows(self, split: Literal["train", "heldout"] | None = None) -> np.ndarray:
        """Numbers of the rows of a split (int64), or of all rows; without those of which every
        document is forgotten."""
        ranges = [
            np.arange(self._first_row[i], self._first_row[i + 1])
            for i, (_, _, unit) in enumerate(self._units)
            if split in (None, unit.split)
        ]
        rows = np.concatenate(ranges) if ranges else np.zeros(0, np.int64)
        return rows[~np.isin(rows, self._empty_rows())] if self._forgotten else rows

    def _empty_rows(self) -> list[int]:
        first = {
            (part.path, number): int(self._first_row[i])
            for i, (part, number, _) in enumerate(self._units)
        }
        return [
            first[part.path, number] + offset
            for part in self.manifest.parts
            for number, offset in part.forgotten_rows
        ]

    def read(
        self,
        rows: Sequence[int] | np.ndarray,
        signals: Sequence[str] = (LOGITS,),
        *,
        decode: bool = True,
    ) -> dict[str, np.ndarray]:
        """Rows with their signals, in the order asked for, each array with leading axis n.

        Always: tokens, segment_ids, positions int32 and loss_mask bool [n, S]. With `logits`:
        topk_ids int32 and topk_logprobs float32 [n, S, k], tail_logmass float32 [n, S, nodes], in
        nats; positions that are not scored hold id 0 and −inf. If there are draws from the tail:
        tail_ids int32, tail_logprobs and tail_logweights float32 [n, S, m], logweights −log(m·r(v))
        of the proposal r; where there is no draw, id 0 and −inf. A row that capture skipped has
        no scored position.

        With `hidden/12`: [n, S, width], bfloat16 as stored or float32 of int8; of a signal with
        `directions` these are the states times them. With `attention/3`: [n, heads, S, S], query
        before key, bfloat16 as stored or float32 of uint8-log. Padding is zero in both. Without
        `decode`, codes as they are stored: int8 with `hidden/12-scale` float32 [n, S], uint8; for
        who decodes on a device, see schemas.targets.hidden and schemas.targets.attention.

        IndexError for a row that does not exist, ValueError for a signal that the cache does not
        hold or a damaged file.
        """
        numbers = np.asarray(rows, np.int64)
        self._require_rows(numbers)
        self._require_signals(signals)
        out = self._allocate(len(numbers), signals)
        at = np.searchsorted(self._first_row, numbers, side="right") - 1
        offsets = numbers - self._first_row[at]
        # TensorStore's threads read arrays while this one decodes records: a thread of Python's own
        # would only take turns with it.
        arrays = [
            self._arrays_of(name).start(at, offsets, decode=decode)
            for name in signals
            if "/" in name
        ]
        keys, forgotten = self._put_rows(at, offsets, out)
        if LOGITS in signals:
            self._put_logits(at, offsets, keys, out)
        for slot, (index, offset) in enumerate(zip(at.tolist(), offsets.tolist(), strict=True)):
            *_, unit = self._units[index]
            if offset in unit.skipped_rows:
                # It keeps its tokens but is scored nowhere, whichever signal had the NaN.
                out["loss_mask"][slot] = False
        for finish in arrays:
            out |= finish()
        for slot, gone in forgotten.items():
            erase(out, slot, gone, signals=(ROWS, *signals))
        return out

    def origins(self, row: int) -> list[tuple[str, int, int]]:
        """Of each segment of a row that is not forgotten: the name of its source, the document's
        place in it as in records.rows.Segment, and its first token counted from the document's."""
        numbers = np.array([row])
        self._require_rows(numbers)
        at = np.searchsorted(self._first_row, numbers, side="right") - 1
        ((record, where),) = self._records(ROWS, at, numbers - self._first_row[at])
        kept, _ = decode_row(record, where=where)
        part, *_ = self._units[int(at[0])]
        origins = kept.origins
        if part.path in self._forgotten:
            origins = origins[~self._forgotten[part.path].segments(origins)]
        return [
            (part.sources[source].name, document, start)
            for source, document, start in origins.tolist()
        ]

    def directions(self, name: str) -> np.ndarray | None:
        """What `hidden/12` was projected onto, float32 [teacher's width, width], by falling
        variance; None if its states are whole. ValueError if the cache does not hold the signal.

        They belong to a part: ValueError if parts disagree.
        """
        self._require_signals([name])
        found = []
        for part in self._directories():
            file = getattr(part.signals[name], "directions", None)
            if file:
                sha256 = part.statistics[file]
                found.append(load_statistic(self.path / part.path, file, sha256=sha256))
        if any(not np.array_equal(found[0], other) for other in found[1:]):
            raise ValueError(f"{self.path}: the parts have other directions of {name} each")
        return found[0] if found else None

    def _arrays_of(self, name: str) -> "SignalArrays":
        # Imported at the first use: who reads logits alone does not load TensorStore.
        from decant.schemas.reading.signal_arrays import SignalArrays

        if name not in self._arrays:
            self._arrays[name] = SignalArrays(self.path, self.manifest, name)
        return self._arrays[name]

    def _records(self, name: str, at: np.ndarray, offsets: np.ndarray) -> list[tuple[bytes, str]]:
        """The record of each row and its name in errors, of rows `offsets` of units `at`."""
        found: list[Any] = [None] * len(at)
        for index in np.unique(at).tolist():
            *_, unit = self._units[index]
            path = self._record_file(index, name)
            slots = np.flatnonzero(at == index).tolist()
            rows = offsets[slots].tolist()
            expected = unit.files[name]
            records = self._readers.read(path, rows, expected=expected)
            for slot, row, record in zip(slots, rows, records, strict=True):
                found[slot] = record, f"{path} record {row}"
        return found

    def _record_file(self, index: int, name: str) -> Path:
        # Kept: to make a path takes as long as to read a record.
        if (index, name) not in self._paths:
            part, number, _ = self._units[index]
            self._paths[index, name] = PartLayout(self.path / part.path).records(name, number)
        return self._paths[index, name]

    def _put_rows(
        self, at: np.ndarray, offsets: np.ndarray, out
    ) -> tuple[list[bytes], dict[int, np.ndarray]]:
        """Puts tokens and the like into `out`; the rows' keys, and positions of forgotten documents
        by slot."""
        keys, forgotten = [], {}
        for slot, (record, where) in enumerate(self._records(ROWS, at, offsets)):
            row, key = decode_row(record, where=where)
            for name in ROW_FIELDS:
                out[name][slot] = getattr(row, name)
            keys.append(key)
            if self._forgotten:
                part, *_ = self._units[int(at[slot])]
                known = self._forgotten.get(part.path)
                if known and (gone := known.positions(row)).any():
                    forgotten[slot] = gone
        return keys, forgotten

    def _put_logits(self, at: np.ndarray, offsets: np.ndarray, keys: list[bytes], out) -> None:
        records = [
            open_logits(record, where=where) for record, where in self._records(LOGITS, at, offsets)
        ]
        scored = np.zeros(out["loss_mask"].shape, bool)
        for slot, (record, key) in enumerate(zip(records, keys, strict=True)):
            require_same_key(key, record.row_key, where=record.where)
            scored[slot] = record.scored
        out["loss_mask"] &= scored
        clear_targets(out, np.flatnonzero(~scored))
        parts = [self._units[index][0] for index in at.tolist()]
        for part in {part.path: part for part in parts}.values():
            # By path: several parts of one directory have its tables in common.
            slots = [slot for slot, its in enumerate(parts) if its.path == part.path]
            for some in group_for_decoding([records[slot] for slot in slots]):
                self._put_targets(part, {slots[i]: records[slots[i]] for i in some}, out)

    def _put_targets(self, part: Part, records: dict[int, LogitsRecord], out) -> None:
        targets = decode_logits(
            list(records.values()),
            tables=self._tables(part),
            vocabulary=self.manifest.vocabulary_size,
        )
        length = self.manifest.sequence_length
        places = [slot * length + np.flatnonzero(r.scored) for slot, r in records.items()]
        fill_targets(out, np.concatenate(places), targets=targets, nodes=self.manifest.betas)

    def tail_prior(self) -> np.ndarray:
        """log π at the nodes `targets.BETAS`: float32 [7, vocabulary], of all parts as one.

        See decant.schemas.targets.prior. ValueError if a part was captured without one.
        """
        return log_prior(self.tail_priors())

    def tail_priors(self) -> list[TailPrior]:
        """What `tail_prior` is made of, by directory of parts: several caches of one teacher can be
        pooled."""
        return [self._tail_prior_of(part) for part in self._directories()]

    def _directories(self) -> list[Part]:
        """A part of each directory: what calibration froze is there once."""
        return list({part.path: part for part in reversed(self.manifest.parts)}.values())[::-1]

    def _tail_prior_of(self, part: Part) -> TailPrior:
        sums, counts = (part.statistics.get(name) for name in (SUMS, COUNTS))
        if sums is None or counts is None:
            raise ValueError(
                f"{self.path / part.path}: captured without a tail prior, as version 0.1 did; "
                "use another loss.tail, or capture again"
            )
        root = self.path / part.path
        return TailPrior(
            load_statistic(root, SUMS, sha256=sums), load_statistic(root, COUNTS, sha256=counts)
        )

    def _allocate(self, n: int, signals: Sequence[str]) -> dict[str, np.ndarray]:
        length = self.manifest.sequence_length
        out: dict[str, np.ndarray] = {
            name: np.zeros((n, length), np.int32) for name in ROW_FIELDS[:3]
        }
        out["loss_mask"] = np.zeros((n, length), bool)
        if LOGITS in signals:
            out |= allocate_targets(n, length=length, spec=self.manifest.logits)
        return out

    def _tables(self, part: Part) -> Tables:
        if part.path not in self._tables_of:
            self._tables_of[part.path] = load_tables(self.path / part.path, part.statistics)
        return self._tables_of[part.path]

    def logits_bytes(self, rows: Sequence[int] | np.ndarray) -> dict[str, int]:
        """Bytes of these rows' logits records by what they hold, see records.logits.field_bytes."""
        found: Counter[str] = Counter()
        for number in rows:
            at = int(np.searchsorted(self._first_row, number, side="right")) - 1
            *_, unit = self._units[at]
            path = self._record_file(at, LOGITS)
            offset = int(number - self._first_row[at])
            expected = unit.files[LOGITS]
            (record,) = self._readers.read(path, [offset], expected=expected)
            found.update(field_bytes(record, where=f"{path} record {offset}"))
        return dict(found)

    def _require_rows(self, numbers: np.ndarray) -> None:
        outside = numbers[(numbers < 0) | (numbers >= len(self))]
        if len(outside):
            raise IndexError(f"{self.path}: row {outside[0]} asked for, it has {len(self)} rows")

    def _require_signals(self, signals: Sequence[str]) -> None:
        held = self.manifest.signals
        for name in signals:
            if name not in held:
                raise ValueError(
                    f"{self.path}: no signal {name!r}; this cache holds {', '.join(held)}"
                )
