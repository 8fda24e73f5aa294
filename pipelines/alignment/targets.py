"""The targets of aligned rows: which positions have one, and what it is."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from decant.pipelines.alignment.dense import DenseProjection
from decant.pipelines.alignment.heads import matched_head, project_counts, project_head
from decant.pipelines.alignment.positions import Positions, positions_of
from decant.pipelines.alignment.rows import AlignedRow, Aligner
from decant.pipelines.alignment.source_targets import SourceTargets
from decant.pipelines.teacher.targets import CHUNK_TOKENS, LogitsSpec, TokenInputs
from decant.schemas.disk.layout import COUNTS, SKETCH
from decant.schemas.reading.record_signals import LABELS
from decant.schemas.records.rows import Row, next_tokens
from decant.schemas.signals import CountsSignal, LogitsSignal
from decant.schemas.targets.counts import Counts, count_draws
from decant.schemas.targets.draws import COUNTS_STREAM, Draws, uniform_starts
from decant.schemas.targets.targets import Targets

_ROWS_AT_ONCE = 16
_MOVES = b"decant align moves 1"
"""Name of the stream of starts that round shares of counts."""


@dataclass(frozen=True, eq=False)
class RowTargets:
    """A row, which of its positions have a target (`taught`, bool [S]), and these targets."""

    row: Row
    taught: np.ndarray
    targets: Targets
    counts: Counts | None


class TargetMaker:
    """Makes the targets of aligned rows as `logits` describes, and `draws` counts."""

    def __init__(self, aligner: Aligner, *, logits: LogitsSignal, draws: int):
        self._aligner, self._logits, self._draws = aligner, logits, draws
        cache = aligner.cache
        held = cache.manifest.signals
        self._size = aligner.student.size
        self._matched = logits.unmatched > 0
        self._sketched = SKETCH in held and not self._matched and logits.k > 0
        counts = held.get(COUNTS)
        asks_counts = isinstance(counts, CountsSignal) and counts.draws == draws
        read = [SKETCH] * self._sketched + [COUNTS] * asks_counts
        read += [LABELS] * (LABELS in cache.targets)
        self._counted = asks_counts
        self._source = SourceTargets(cache, targets=read)
        self._dense = []
        if self._sketched:
            spec = LogitsSpec(
                dataclasses.replace(logits.target_spec, labels=False, mass=None),
                counts=0 if self._counted else draws,
            )
            self._dense = [
                DenseProjection(head, first=aligner.first, size=self._size, spec=spec)
                for head in cache.sketch_heads()
            ]

    def of_rows(self, rows: Sequence[AlignedRow]) -> Iterator[RowTargets]:
        """The targets of each row."""
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            yield from self._of_some(rows[start : start + _ROWS_AT_ONCE])

    def _of_some(self, rows: Sequence[AlignedRow]) -> Iterator[RowTargets]:
        length = self._aligner.length
        source = np.concatenate([row.source for row in rows])
        asked = np.flatnonzero(source >= 0)
        if not len(asked):
            yield from (self._empty(row.row) for row in rows)
            return
        arrays, at = self._source.at(source[asked])
        labels = np.concatenate([next_tokens(row.row.tokens) for row in rows])
        positions = positions_of(
            at,
            np.concatenate([row.spans for row in rows])[asked],
            labels[asked],
            tokens=arrays["tokens"],
            label_logprobs=arrays.get("label_logprobs"),
            first=self._aligner.first,
        )
        there = np.isfinite(arrays["topk_logprobs"][at]).any(-1)
        if self._counted:
            there |= (arrays["counts"][at] > 0).any(-1)
        known = there & positions.known
        if not known.any():
            yield from (self._empty(row.row) for row in rows)
            return
        asked, at, positions = asked[known], at[known], positions[known]
        batch = {name: array[at] for name, array in arrays.items()}
        starts = {
            stream: np.concatenate(
                [uniform_starts(row.row.key, positions=length, stream=stream) for row in rows]
            )[asked]
            for stream in (_MOVES, COUNTS_STREAM)
        }
        tails = np.concatenate([uniform_starts(row.row.key, positions=length) for row in rows])
        targets, counts, made = self._made(batch, positions, starts, tails[asked])
        taught = np.zeros(len(source), bool)
        taught[asked[made]] = True
        targets, counts = targets[made], None if counts is None else counts[made]
        before = 0
        for slot, row in enumerate(rows):
            own = taught[slot * length : (slot + 1) * length]
            some = slice(before, before + int(own.sum()))
            before = some.stop
            yield RowTargets(row.row, own, targets[some], None if counts is None else counts[some])

    def _empty(self, row: Row) -> RowTargets:
        k, nodes = self._logits.k, len(self._logits.betas) if self._logits.k else 0
        targets = Targets(
            np.zeros((0, k), np.int32),
            np.zeros((0, k), np.float32),
            np.zeros((0, nodes), np.float32),
            label_logprobs=np.zeros(0, np.float32) if self._logits.labels else None,
        )
        nothing = np.zeros((0, 0), np.int32)
        counts = Counts(nothing, nothing, self._draws) if self._draws else None
        return RowTargets(row, np.zeros(len(row.tokens), bool), targets, counts)

    def _made(self, batch, at: Positions, starts, tails):
        """Targets and counts of the positions, and which of them could be made."""
        counts, made = None, np.ones(len(at), bool)
        if self._counted:
            own = Counts(batch["count_ids"], batch["counts"], self._draws)
            counts, made = project_counts(
                own, at, first=self._aligner.first, starts=starts[_MOVES], size=self._size
            )
        if self._matched:
            targets = self._as_matched(batch, at)
        elif self._sketched:
            targets, drawn = self._from_sketches(batch, at, starts[COUNTS_STREAM], tails)
            counts = counts if drawn is None else drawn
        else:
            targets = self._from_heads(batch, at)
            if self._logits.k:
                made = made & np.isfinite(targets.logprobs[:, 0])
        if not self._logits.labels:
            return dataclasses.replace(targets, label_logprobs=None), counts, made
        assert targets.label_logprobs is not None
        return targets, counts, made & np.isfinite(targets.label_logprobs)

    def _as_matched(self, batch, at: Positions) -> Targets:
        ids = matched_head(
            batch["topk_ids"],
            batch["topk_logprobs"],
            partners=self._aligner.partners,
            size=self._size,
        )
        held = np.isfinite(batch["topk_logprobs"])
        return Targets(
            np.where(held, ids, 0).astype(np.int32),
            batch["topk_logprobs"],
            batch["tail_logmass"],
            label_logprobs=_label_logprobs(batch, at),
            sizes=None if self._logits.mass is None else held.sum(1),
        )

    def _from_heads(self, batch, at: Positions) -> Targets:
        if not self._logits.k:
            nothing = np.zeros((len(at), 0), np.float32)
            labels = _label_logprobs(batch, at)
            return Targets(nothing.astype(np.int32), nothing, nothing, label_logprobs=labels)
        return project_head(
            batch["topk_ids"],
            batch["topk_logprobs"],
            batch["tail_logmass"][:, -1],
            at,
            first=self._aligner.first,
            size=self._size,
            betas=self._logits.betas,
        )

    def _from_sketches(
        self, batch, at: Positions, counts_starts, tails
    ) -> tuple[Targets, Counts | None]:
        """Targets of positions with sketches, each by the basis of its row."""
        logits = self._logits
        asked = TokenInputs(
            starts=tails if logits.draws else None,
            counts_starts=counts_starts if self._draws and not self._counted else None,
        )
        fields: dict[str, np.ndarray] = {}
        for number, dense in enumerate(self._dense):
            own = np.flatnonzero(batch["sketch_basis"] == number)
            for start in range(0, len(own), CHUNK_TOKENS):
                some = own[start : start + CHUNK_TOKENS]
                inputs = TokenInputs(*(None if x is None else x[some] for x in asked))
                chunk = {n: batch[n][some] for n in _OF_SKETCHES}
                for name, array in dense(chunk, at[some], inputs).items():
                    room = (len(at), *array.shape[1:])
                    fields.setdefault(name, np.zeros(room, array.dtype))[some] = array
        draws = None
        if logits.draws:
            draws = Draws(fields["tail_ids"], fields["tail_logprobs"], logits.draw_betas)
        targets = Targets(
            fields["ids"],
            fields["logprobs"],
            fields["tail_logmass"],
            draws,
            fields["label_logprobs"],
        )
        return targets, count_draws(fields["count_ids"]) if "count_ids" in fields else None


_OF_SKETCHES = ("sketch", "topk_ids", "topk_logprobs", "tail_logmass")


def _label_logprobs(batch, at: Positions) -> np.ndarray:
    """log P(y) by the chain rule, or what t₁ gives to y: float32 [n]."""
    chained = np.where(np.isfinite(at.rest), at.label_logprob + at.rest, at.label_logprob)
    return np.minimum(chained, 0.0).astype(np.float32)
