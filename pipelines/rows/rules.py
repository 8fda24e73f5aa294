"""The rules that decide how a corpus becomes rows and units."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from decant.models.text.chat_template import ChatTemplate
from decant.pipelines.config import Corpus
from decant.pipelines.rows.formats import format_before_0_9
from decant.pipelines.rows.heldout_pieces import VERSION as PIECES
from decant.pipelines.rows.marking import VERSION as MARKING
from decant.pipelines.rows.marking import VERSIONS as MARKINGS
from decant.pipelines.rows.marking import marking_rules
from decant.pipelines.rows.packing import VERSION as PACKING_VERSION
from decant.pipelines.rows.rollouts import VERSION as ROLLOUTS
from decant.pipelines.rows.rollouts import VERSIONS as OF_ROLLOUTS
from decant.pipelines.rows.sources import Kind, SourceFile

_BYTES_A_TOKEN: dict[Kind, int] = {"rollout": 24}
"""About; rollouts have a number and perhaps an id beside each token. Of other kinds, 4."""


class RowRules(NamedTuple):
    """The rules of rows that differ between releases or corpora."""

    marking: int = MARKING
    """Version of the rules that mark what is learned."""
    rollouts: int = ROLLOUTS
    """Version of the rules of rollouts."""
    pieces: bool = False
    """Whether pieces of texts are held out, because there are too few documents."""

    @property
    def by_prompt(self) -> bool:
        """Whether the prompt of a rollout decides if it is held out, not the whole rollout."""
        return self.rollouts > 1


NEWEST = RowRules()


def rules_of_releases() -> Iterator[RowRules]:
    """All rules that a cache may have been begun with, newest first."""
    for marking in MARKINGS:
        for rollouts in OF_ROLLOUTS:
            for pieces in (False, True):
                yield RowRules(marking, rollouts, pieces)


def row_rules(
    corpus: Corpus,
    sources: Sequence[SourceFile],
    *,
    template: ChatTemplate | None = None,
    rules: RowRules = NEWEST,
) -> dict[str, Any]:
    """All settings that decide the rows, apart from text and tokenizer; part of rows_id.

    `corpus` has its defaults resolved. `template` is the chat template, if there are chats.
    """
    kinds: set[Kind] = {source.kind for source in sources}
    written = {"rollouts": rules.rollouts} if "rollout" in kinds else {}
    cut = {"heldout_pieces": PIECES} if rules.pieces else {}
    return (
        marking_rules(kinds, template, version=rules.marking)
        | written
        | cut
        | _own_rules(sources)
        | {
            "version": PACKING_VERSION,
            "sequence_length": corpus.sequence_length,
            "bos": "as the tokenizer",
            "eos": "after every document",
            "deduplicate": "exact",
            "heldout": corpus.heldout,
            "open_rows": corpus.open_rows,
            "shard_bytes": corpus.shard_bytes,
            "text_field": corpus.text_field,
            "on_error": corpus.on_error,
        }
    )


def _own_rules(sources: Sequence[SourceFile]) -> dict[str, Any]:
    """Rules of files that releases before 0.9 would read otherwise; none for others."""
    formats = [(s.name, s.format) for s in sources if s.format != format_before_0_9(s.path)]
    fields = [(s.name, s.text_field) for s in sources if s.text_field]
    groups = [s.group for s in sources] if any(source.group for source in sources) else []
    own = {"formats": formats, "text_fields": fields, "groups": groups}
    return {name: value for name, value in own.items() if value}


def settings_of_rows(rules: Mapping[str, Any], *, tokenizer: str) -> dict[str, Any]:
    """`rules` of `row_rules` and the tokenizer's digest by names that a user knows, for errors."""
    return {f"corpus.{name}": value for name, value in rules.items()} | {
        "tokenizer": tokenizer[:12]
    }


def choose_unit_rows(sources: Sequence[SourceFile], *, length: int, batch_rows: int = 1) -> int:
    """U, rows per unit, for rows of `length` tokens: a power of two of at most about 4M tokens and
    4,096 rows, and small enough that the corpus gives 16 units; but no less than a batch of
    `batch_rows`, because no batch spans two units and the teacher would run on padding."""
    rows = sum(s.bytes / _BYTES_A_TOKEN.get(s.kind, 4) for s in sources) / length
    most = max(1, min(4096, (4 << 20) // length))
    of_sixteen = 1 << (max(1, min(most, int(rows / 16))).bit_length() - 1)
    of_a_batch = 1 << (min(most, batch_rows) - 1).bit_length()
    return max(of_sixteen, of_a_batch)
