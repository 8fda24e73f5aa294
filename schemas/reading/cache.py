"""Open a sealed cache and read rows with their signals as padded numpy arrays."""

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from decant.schemas.disk.array_record import FileEntry, RecordReaders
from decant.schemas.disk.layout import LOGITS, RECORDS, ROWS, SKETCH, TOKENIZER, PartLayout
from decant.schemas.manifest.manifest import Manifest, Part, Source, Unit, read_manifest
from decant.schemas.manifest.statistics import MATCHED, load_statistic
from decant.schemas.manifest.tokenizer_files import tokenizer_files
from decant.schemas.reading.forgetting import ForgottenDocuments, erase
from decant.schemas.reading.merged_parts import refresh_parts
from decant.schemas.reading.record_signals import COMPANIONS, DRAWS, LABELS, RecordSignals
from decant.schemas.reading.remote import fetch_tokenizer, open_remote
from decant.schemas.records.logits import field_bytes
from decant.schemas.records.rows import ROW_FIELDS, WRITER_LOGPROBS, decode_row
from decant.schemas.targets.prior import COUNTS, SUMS, TailPrior, log_prior
from decant.schemas.targets.sketch import SketchHead
from decant.schemas.targets.unmatched import Partners, split_unmatched
from decant.store.mirror import Mirror
from decant.store.mirrored_file import wait_for
from decant.store.urls import BUCKETS, is_url, require_scheme

if TYPE_CHECKING:
    from decant.schemas.reading.signal_arrays import SignalArrays

_SHARE_OF_ROWS = 8
"""Rows may take one in so many bytes of a mirror."""
TARGETS = (DRAWS, LABELS, *COMPANIONS)
"""What a cache may hold of a distribution beside the top-k and its tail's mass."""


def open_cache(
    path: str | Path, *, mirror: str | Path | None = None, mirror_bytes: int | None = None
) -> "Cache":
    """Open the sealed cache at `path`, without reading rows or signals.

    `path` may be an address, `s3://bucket/cache` or `gs://bucket/cache`. What is read of it is then
    kept below the folder `mirror`, in sparse files. Unset: DECANT_MIRROR, else the user's cache
    directory (`~/.cache/decant`). All mirrors there take at most `mirror_bytes` bytes, by default
    half of what is free on the disk; what was not used for longest is deleted.

    Raises ValueError with the reason if the cache is unsealed, not a cache or of another format
    version, if its manifest is damaged, or if it refers to a part of another cache that is gone.
    StoreError, an OSError, if a bucket cannot be read or a mirror not be written.
    """
    require_scheme(path, BUCKETS, name="the cache")
    if is_url(path):
        place = Path(mirror) if mirror else None
        return Cache(*open_remote(path, place=place, most_bytes=mirror_bytes))
    path = Path(path)
    return Cache(path, refresh_parts(path, read_manifest(path)))


class Cache:
    """A sealed cache. Row numbers run from 0 over all parts and units, in manifest order."""

    mirror: Mirror | None = None
    """Fetches the files in `path`, if the cache is in a bucket."""

    def __init__(self, path: Path, manifest: Manifest, mirror: Mirror | None = None):
        self.path = path
        self.manifest = manifest
        self.mirror = mirror
        # The attributes below belong to this process: see __reduce__.
        self._readers = RecordReaders(mirror=mirror)
        self._paths: dict[tuple[int, str], Path] = {}
        self._record_signals = RecordSignals(path, manifest, mirror)
        self._arrays: dict[str, SignalArrays] = {}
        self._units = [(part, *pair) for part in manifest.parts for pair in part.numbered_units]
        self._has_writers = bool(manifest.writers)
        counts = [unit.rows for _, _, unit in self._units]
        self._first_row = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._forgotten = {
            part.path: ForgottenDocuments(part) for part in manifest.parts if part.forgotten
        }

    def __reduce__(self) -> tuple:
        # A worker process gets the manifest and opens its own files when it needs them.
        return type(self), (self.path, self.manifest, self.mirror)

    def __len__(self) -> int:
        return int(self._first_row[-1])

    @property
    def address(self) -> str:
        """Where the cache is: a path, or an address such as `s3://bucket/cache`."""
        if self.mirror is None:
            return str(self.path)
        below = self.path.relative_to(self.mirror.files).as_posix()
        return self.mirror.url if below == "." else f"{self.mirror.url}/{below}"

    @property
    def targets(self) -> tuple[str, ...]:
        """Of `draws`, `labels`, `counts` and `sketch`, those that the cache holds."""
        signals = self.manifest.signals
        if LOGITS not in signals:
            return ()
        logits = self.manifest.logits
        held = {DRAWS: logits.draws > 0, LABELS: logits.labels}
        return tuple(name for name in TARGETS if held.get(name, name in signals))

    @property
    def tokenizer_path(self) -> Path:
        """Directory of the tokenizer, its chat template and the teacher's config."""
        if self.mirror:
            fetch_tokenizer(self.mirror, self.path, self.manifest)
        return self.path / TOKENIZER

    def plan_path(self, part: Part) -> Path:
        """The plan of a part."""
        path = PartLayout(self.path / part.path).plan
        return self.mirror.whole(path) if self.mirror else path

    def tokenizer_files(self) -> dict[str, bytes]:
        """Contents of the files in `tokenizer_path` by name; links and devices are left out.

        ValueError if they are too large or the directory is a link; FileNotFoundError if there is
        none.
        """
        return tokenizer_files(self.tokenizer_path.parent)

    def rows(
        self, split: Literal["train", "heldout"] | None = None, *, group: str | None = None
    ) -> np.ndarray:
        """Row numbers of a split, or of all rows: int64 [rows]; with `group` those of its files.

        Rows that hold only forgotten documents are left out.
        """
        ranges = [
            np.arange(self._first_row[i], self._first_row[i + 1])
            for i, (_, _, unit) in enumerate(self._units)
            if split in (None, unit.split) and group in (None, unit.group)
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
        targets: Collection[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """The rows with these numbers and their signals: arrays by name, [n, …] with n = len(rows).

        Always: tokens, segment_ids and positions int32 [n, S], loss_mask bool [n, S]. If the cache
        has rollouts (`manifest.writers`), also writer_logprobs float32 [n, S]: the log-probability
        that the text's writer gave to token t + 1, at T = 1, in nats. NaN where it wrote nothing,
        and at positions without a target.

        `logits` adds topk_ids int32 [n, S, k], topk_logprobs float32 [n, S, k] and tail_logmass
        float32 [n, S, nodes], in nats. Positions without a target hold id 0 and −inf. If the cache
        stores tail draws, `logits` also adds tail_ids int32, tail_logprobs float32 and
        tail_logweights float32, all [n, S, m]. A log-weight is −log(m·r(v)) with proposal r. Id 0
        and −inf mark a missing draw. A row that capture skipped has no scored position.

        If the cache stores label log-probabilities, `logits` adds label_logprobs float32 [n, S]:
        the log-probability of the text's next token. If it holds `counts` or `sketch`, `logits`
        also adds their arrays. Each can also be named alone in `signals`:
        - `counts`: count_ids and counts int32 [n, S, N], N the draws a position. Ids are distinct
          and ascending; empty slots follow, with id 0 and count 0.
        - `sketch`: sketch float32 [n, S, r], 0 at positions without one, and sketch_basis int32
          [n], the index of each row's head in `sketch_heads()`.

        If the cache was made by `decant align --targets matched`, the top-k holds only ids that are
        tokens of the teacher too, and `logits` also adds unmatched_logprobs float32 [n, S, k]: the
        teacher's stored tokens that the vocabulary lacks, descending. tail_logmass includes them.

        `hidden/12` adds states [n, S, width]: bfloat16 if stored so, float32 if stored as int8. A
        signal with `directions` holds the states times those. `attention/3` adds maps
        [n, heads, S, S] (query, key): bfloat16 if stored so, float32 if stored as uint8-log.
        Padding is zero in both.

        `targets` names what `logits` adds to the top-k: `draws`, `labels`, `counts` and `sketch`.
        All others are left out: they are not decoded, and records of counts and sketches not read.
        None: all that the cache holds (`Cache.targets`); `targets=()`: the top-k alone. A record
        that is read is checked whole by its checksum, whichever of its fields are decoded.

        decode=False returns the stored codes instead: int8 with `hidden/12-scale` float32 [n, S],
        and uint8. `targets/hidden.py` and `targets/attention.py` decode them on a device.

        Raises IndexError for a row that does not exist; ValueError for a signal or target that the
        cache does not hold, or for a damaged file.
        """
        numbers = np.asarray(rows, np.int64)
        self._require_rows(numbers)
        signals, targets = self._asked_for(signals, targets)
        if self.mirror is None:
            return self._read(numbers, signals, decode=decode, targets=targets)
        try:
            return self._read_remote(numbers, signals, decode=decode, targets=targets)
        except ValueError:
            # The mirror may be damaged: what these rows need is fetched again, once.
            self._forget(numbers, signals)
        try:
            return self._read_remote(numbers, signals, decode=decode, targets=targets)
        except ValueError as error:
            raise ValueError(f"{error} (fetched twice from {self.address})") from None

    def fetch(
        self,
        rows: Sequence[int] | np.ndarray,
        signals: Sequence[str] = (LOGITS,),
        *,
        targets: Collection[str] | None = None,
    ) -> list[Future]:
        """Begin to fetch what `read` needs into the mirror; returns what to wait for.

        Neighbouring records are fetched by one request. Empty for a cache on this machine. Another
        thread may read meanwhile. Raises as `read` does.
        """
        if self.mirror is None:
            return []
        numbers = np.asarray(rows, np.int64)
        self._require_rows(numbers)
        signals, _ = self._asked_for(signals, targets)
        return self._fetch(numbers, signals)

    def _fetch(self, numbers: np.ndarray, signals: Sequence[str]) -> list[Future]:
        assert self.mirror is not None
        at, offsets = self._places(numbers)
        stored_in_records = [name for name in RECORDS if name in signals]
        parts = {part.path: part for part, _, _ in (self._units[i] for i in np.unique(at))}
        futures = self._record_signals.fetch_tables(stored_in_records, parts.values())
        opening = []
        for name, path, numbers_in_file, expected in self._record_files(at, offsets, signals):
            start = partial(
                self._readers.start,
                path,
                numbers_in_file,
                expected=expected,
                in_pieces=name == ROWS and self._rows_stay,
            )
            if self._readers.is_known(path):
                futures += start()
            else:  # waits for requests, each in a thread
                opening.append(self.mirror.opening.submit(start))
        futures += [future for opened in opening for future in opened.result()]
        for name in signals:
            if "/" in name:
                futures += self._arrays_of(name).fetch(at, offsets)
        return futures

    def _forget(self, numbers: np.ndarray, signals: Sequence[str]) -> None:
        at, offsets = self._places(numbers)
        for _, path, _, expected in self._record_files(at, offsets, signals):
            self._readers.forget(path, expected)
        for name in signals:
            if "/" in name:
                self._arrays_of(name).forget(at, offsets)

    def _record_files(
        self, at: np.ndarray, offsets: np.ndarray, signals: Sequence[str]
    ) -> Iterator[tuple[str, Path, list[int], FileEntry]]:
        """(signal or `ROWS`, file, numbers of its records, its entry) of what rows need."""
        logits = [LOGITS] if any(name in RECORDS for name in signals) else []
        for name in dict.fromkeys([ROWS, *logits, *(n for n in RECORDS if n in signals)]):
            for index in np.unique(at).tolist():
                *_, unit = self._units[index]
                numbers = offsets[at == index].tolist()
                yield name, self._record_file(index, name), numbers, unit.files[name]

    @cached_property
    def _rows_stay(self) -> bool:
        """Whether the mirror has room for the rows of all units, which are small.

        They are then fetched in pieces of many rows, by few requests. In a mirror with less room
        they would not stay until the others of a piece are read.
        """
        assert self.mirror is not None
        size = sum(unit.files[ROWS].bytes for _, _, unit in self._units)
        return size <= self.mirror.most_bytes // _SHARE_OF_ROWS

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The unit of each row, and its offset there."""
        at = np.searchsorted(self._first_row, numbers, side="right") - 1
        return at, numbers - self._first_row[at]

    def _read_remote(
        self,
        numbers: np.ndarray,
        signals: Sequence[str],
        *,
        decode: bool,
        targets: Collection[str],
    ) -> dict[str, np.ndarray]:
        wait_for(self._fetch(numbers, signals))
        return self._read(numbers, signals, decode=decode, targets=targets)

    def _read(
        self,
        numbers: np.ndarray,
        signals: Sequence[str],
        *,
        decode: bool,
        targets: Collection[str],
    ) -> dict[str, np.ndarray]:
        stored_in_records = [name for name in RECORDS if name in signals]
        out = self._allocate(len(numbers)) | self._record_signals.allocate(
            len(numbers), stored_in_records, targets=targets
        )
        at, offsets = self._places(numbers)
        # TensorStore's threads read arrays while this thread decodes records. A Python thread would
        # only take turns with this one.
        arrays = [
            self._arrays_of(name).start(at, offsets, decode=decode)
            for name in signals
            if "/" in name
        ]
        keys, forgotten = self._fill_rows(at, offsets, out)
        if stored_in_records:
            self._record_signals.fill(
                stored_in_records,
                [self._units[index][0] for index in at.tolist()],
                keys,
                lambda name: self._records(name, at, offsets),
                out,
            )
        for slot, (index, offset) in enumerate(zip(at.tolist(), offsets.tolist(), strict=True)):
            *_, unit = self._units[index]
            if offset in unit.skipped_rows:
                # The row keeps its tokens but has no target, whichever signal had the NaN.
                out["loss_mask"][slot] = False
                if WRITER_LOGPROBS in out:
                    out[WRITER_LOGPROBS][slot] = np.nan
        for finish in arrays:
            out |= finish()
        for slot, gone in forgotten.items():
            erase(out, slot, gone, signals=(ROWS, *signals))
        if LOGITS in signals and self.manifest.logits.unmatched:
            out |= split_unmatched(out, vocabulary=self.manifest.vocabulary_size)
        return out

    def row_key(self, row: int) -> bytes:
        """The key of a row: 16 bytes, which seed its draws."""
        numbers = np.array([row])
        self._require_rows(numbers)
        at = np.searchsorted(self._first_row, numbers, side="right") - 1
        ((record, where),) = self._records(ROWS, at, numbers - self._first_row[at])
        _, key = decode_row(record, where=where, length=self.manifest.sequence_length)
        return key

    def origins(self, row: int) -> list[tuple[str, int, int]]:
        """(source name, document, start) of each segment of a row that is not forgotten.

        `document` and `start` are as in `records.rows.Segment`.
        """
        return [(source.name, document, start) for source, document, start in self.places(row)]

    def places(self, row: int) -> list[tuple[Source, int, int]]:
        """As `origins`, with the whole source."""
        numbers = np.array([row])
        self._require_rows(numbers)
        at = np.searchsorted(self._first_row, numbers, side="right") - 1
        ((record, where),) = self._records(ROWS, at, numbers - self._first_row[at])
        kept, _ = decode_row(record, where=where, length=self.manifest.sequence_length)
        part, *_ = self._units[int(at[0])]
        if ((kept.origins[:, 0] < 0) | (kept.origins[:, 0] >= len(part.sources))).any():
            raise ValueError(f"{where}: names a source beyond the {len(part.sources)} of its part")
        origins = kept.origins
        if part.path in self._forgotten:
            origins = origins[~self._forgotten[part.path].segments(origins)]
        return [
            (part.sources[source], document, start) for source, document, start in origins.tolist()
        ]

    def units(self) -> list[tuple[Part, Unit, np.ndarray]]:
        """Every unit in order, with its part and the numbers of its rows, int64.

        Rows that hold only forgotten documents are left out.
        """
        gone = self._empty_rows()
        ranges = [np.arange(a, b) for a, b in itertools.pairwise(self._first_row.tolist())]
        return [
            (part, unit, rows[~np.isin(rows, gone)])
            for (part, _, unit), rows in zip(self._units, ranges, strict=True)
        ]

    def directions(self, name: str) -> np.ndarray | None:
        """Principal directions of the hidden signal `name`: float32 [teacher_width, width].

        Columns have descending variance. None if the states are stored at full width. ValueError if
        the cache does not hold the signal, or if its parts hold different directions.
        """
        self._require_signals([name])
        matrices = []
        for part in self._directories():
            file = getattr(part.signals[name], "directions", None)
            if file:
                matrices.append(self._directions_of(part, part.signals[name], file))
        if any(not np.array_equal(matrices[0], other) for other in matrices[1:]):
            raise ValueError(f"{self.path}: its parts hold different directions of {name}")
        return matrices[0] if matrices else None

    def _directions_of(self, part: Part, signal: Any, file: str) -> np.ndarray:
        root = self.path / part.path
        if file not in part.statistics:
            raise ValueError(f"{root}: the manifest has no hash of {file}")
        matrix = load_statistic(root, file, sha256=part.statistics[file], mirror=self.mirror)
        shape = (signal.teacher_width, signal.width)
        if matrix.shape != shape or matrix.dtype != np.float32 or not np.isfinite(matrix).all():
            raise ValueError(
                f"{PartLayout(root).statistics / file}: expected finite float32 numbers of shape "
                f"{shape}, got {matrix.dtype} of {matrix.shape}"
            )
        return matrix

    def _arrays_of(self, name: str) -> "SignalArrays":
        # Imported at first use, so that reading only logits does not load TensorStore.
        from decant.schemas.reading.signal_arrays import SignalArrays

        if name not in self._arrays:
            self._arrays[name] = SignalArrays(self.path, self.manifest, name, self.mirror)
        return self._arrays[name]

    def _records(self, name: str, at: np.ndarray, offsets: np.ndarray) -> list[tuple[bytes, str]]:
        """(record, its name in errors) of each row: row `offsets[i]` of unit `at[i]`."""
        named_records: list[Any] = [None] * len(at)
        for index in np.unique(at).tolist():
            *_, unit = self._units[index]
            path = self._record_file(index, name)
            slots = np.flatnonzero(at == index).tolist()
            rows = offsets[slots].tolist()
            expected = unit.files[name]
            records = self._readers.read(path, rows, expected=expected)
            for slot, row, record in zip(slots, rows, records, strict=True):
                named_records[slot] = record, f"{path} record {row}"
        return named_records

    def _record_file(self, index: int, name: str) -> Path:
        # Cached: making a path takes as long as reading a record.
        if (index, name) not in self._paths:
            part, number, _ = self._units[index]
            self._paths[index, name] = PartLayout(self.path / part.path).records(name, number)
        return self._paths[index, name]

    def _fill_rows(
        self, at: np.ndarray, offsets: np.ndarray, out
    ) -> tuple[list[bytes], dict[int, np.ndarray]]:
        """Fill the row fields of `out`. Returns row keys and, by slot, forgotten positions."""
        keys, forgotten = [], {}
        length, vocabulary = self.manifest.sequence_length, self.manifest.vocabulary_size
        for slot, (record, where) in enumerate(self._records(ROWS, at, offsets)):
            row, key = decode_row(record, where=where, length=length)
            # As unsigned, so that one comparison finds ids below 0 too.
            if (largest := row.tokens.view(np.uint32).max()) >= vocabulary:
                raise ValueError(f"{where}: token {largest} in a vocabulary of {vocabulary}")
            for name in ROW_FIELDS:
                out[name][slot] = getattr(row, name)
            if row.writer_logprobs is not None and WRITER_LOGPROBS in out:
                out[WRITER_LOGPROBS][slot] = row.writer_logprobs
            keys.append(key)
            if self._forgotten:
                part, *_ = self._units[int(at[slot])]
                lookup = self._forgotten.get(part.path)
                if lookup and (gone := lookup.positions(row)).any():
                    forgotten[slot] = gone
        return keys, forgotten

    def sketch_heads(self) -> list[SketchHead]:
        """The heads that turn sketches into logits: each distinct one of the parts, in their order.

        `sketch_basis` numbers them. All have as many rows as `sketch` has numbers a position.
        ValueError if the cache holds no sketch, or for a damaged statistic.
        """
        self._require_signals([SKETCH])
        return self._record_signals.heads.all

    def sketch_head(self) -> SketchHead:
        """The only one of `sketch_heads`. ValueError if the parts of the cache have several."""
        first, *others = self.sketch_heads()
        if others:
            raise ValueError(
                f"{self.path}: its parts have {1 + len(others)} sketch heads; use `sketch_heads()` "
                "and the `sketch_basis` of each row"
            )
        return first

    def tail_prior(self) -> np.ndarray:
        """log π of the tail prior at each of `BETAS`, over all parts: float32 [7, vocabulary].

        `targets/prior.py` defines π. ValueError if a part was captured without a tail prior.
        """
        return log_prior(self.tail_priors())

    @property
    def has_tail_prior(self) -> bool:
        """Whether every part was captured with a tail prior."""
        return all({SUMS, COUNTS} <= part.statistics.keys() for part in self.manifest.parts)

    def tail_priors(self) -> list[TailPrior]:
        """The sums and counts behind `tail_prior`, one per directory of parts.

        `log_prior` can pool those of several caches of one teacher.
        """
        return [self._tail_prior_of(part) for part in self._directories()]

    def _directories(self) -> list[Part]:
        """One part per directory, because parts of one directory share its statistics."""
        return list({part.path: part for part in reversed(self.manifest.parts)}.values())[::-1]

    def _tail_prior_of(self, part: Part) -> TailPrior:
        sums, counts = (part.statistics.get(name) for name in (SUMS, COUNTS))
        if sums is None or counts is None:
            raise ValueError(
                f"{self.path / part.path}: captured without a tail prior, as version 0.1 did; "
                "use another loss.tail, or capture again"
            )
        root = self.path / part.path
        prior = TailPrior(
            load_statistic(root, SUMS, sha256=sums, mirror=self.mirror),
            load_statistic(root, COUNTS, sha256=counts, mirror=self.mirror),
        )
        try:
            prior.require_possible(self.manifest.vocabulary_size)
        except ValueError as error:
            raise ValueError(f"{PartLayout(root).statistics / SUMS}: {error}") from None
        return prior

    def matched_ids(self) -> np.ndarray:
        """Which ids of this cache's vocabulary are also single tokens of the teacher's: bool [V].

        ValueError unless the cache has matched targets (`LogitsSignal.unmatched`).
        """
        masks = []
        for part in self._directories():
            if MATCHED not in part.statistics:
                raise ValueError(
                    f"{self.path / part.path}: has no matched targets; make them with `decant "
                    "align --targets matched`"
                )
            root, sha256 = self.path / part.path, part.statistics[MATCHED]
            masks.append(load_statistic(root, MATCHED, sha256=sha256, mirror=self.mirror))
        shape = (self.manifest.vocabulary_size,)
        if any(m.shape != shape or not np.array_equal(m, masks[0]) for m in masks):
            raise ValueError(f"{self.path}: its parts do not have one {MATCHED} of {shape[0]} ids")
        return masks[0].astype(bool)

    def partners(self) -> Partners:
        """Which ids of this cache's vocabulary the teacher has too, for `divergence="gold"`.

        ValueError unless the cache has matched targets of one teacher's tokenizer.
        """
        mask = self.matched_ids()
        sizes = {part.aligned.vocabulary if part.aligned else 0 for part in self.manifest.parts}
        if len(sizes) > 1:
            raise ValueError(
                f"{self.path}: its parts were aligned from teachers with {sorted(sizes)} tokens, "
                "which have no one share in common with the student's"
            )
        share = mask.sum() / (sizes.pop() or len(mask))
        return Partners((~mask).astype(np.float32), np.float32(share))

    def _allocate(self, n: int) -> dict[str, np.ndarray]:
        length = self.manifest.sequence_length
        out: dict[str, np.ndarray] = {
            name: np.zeros((n, length), np.int32) for name in ROW_FIELDS[:3]
        }
        if self._has_writers:
            out[WRITER_LOGPROBS] = np.full((n, length), np.nan, np.float32)
        return out | {"loss_mask": np.zeros((n, length), bool)}

    def logits_bytes(self, rows: Sequence[int] | np.ndarray) -> dict[str, int]:
        """Bytes of these rows' logits records by field; keys as in `records.logits.field_bytes`."""
        sizes: Counter[str] = Counter()
        for number in rows:
            at = int(np.searchsorted(self._first_row, number, side="right")) - 1
            *_, unit = self._units[at]
            path = self._record_file(at, LOGITS)
            offset = int(number - self._first_row[at])
            expected = unit.files[LOGITS]
            (record,) = self._readers.read(path, [offset], expected=expected)
            sizes.update(field_bytes(record, where=f"{path} record {offset}"))
        return dict(sizes)

    def _require_rows(self, numbers: np.ndarray) -> None:
        outside = numbers[(numbers < 0) | (numbers >= len(self))]
        if len(outside):
            raise IndexError(f"{self.path}: row {outside[0]} asked for, it has {len(self)} rows")

    def _asked_for(
        self, signals: Sequence[str], targets: Collection[str] | None
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """All signals to read, and the targets that `logits` adds: `targets`, or all that are held.

        ValueError for a name that the cache does not hold.
        """
        for name in targets or ():
            if name not in TARGETS:
                raise ValueError(f"targets names {name!r}; expected some of {', '.join(TARGETS)}")
        if LOGITS not in signals:
            self._require_signals(signals)
            return tuple(signals), ()
        asked = self.targets if targets is None else tuple(targets)
        companions = [name for name in asked if name in COMPANIONS]
        signals = tuple(dict.fromkeys((*signals, *companions)))
        self._require_signals(signals)
        if missing := [name for name in asked if name not in self.targets]:
            held = ", ".join(self.targets) or "none"
            raise ValueError(
                f"{self.path}: targets names {missing[0]!r}; of {', '.join(TARGETS)} this cache "
                f"holds {held}"
            )
        return signals, asked

    def _require_signals(self, signals: Sequence[str]) -> None:
        held = self.manifest.signals
        for name in signals:
            if name not in held:
                raise ValueError(
                    f"{self.path}: no signal {name!r}; this cache holds {', '.join(held)}"
                )
