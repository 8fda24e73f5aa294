"""One row of a cache for people: its tokens, what the teacher predicted for each, its documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from rich.text import Text

from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.inspection.entropy import entropies
from decant.schemas import Cache
from decant.schemas.records.rows import PADDING


@dataclass(frozen=True)
class Prediction:
    """The teacher's distribution for one token, given the tokens before it."""

    entropy: float
    """Of the whole distribution, in nats."""
    tail: float
    """Probability outside the stored top-k."""
    probability: float | None
    """Of the token that follows; None if it is not in the stored top-k."""
    alternatives: tuple[tuple[str, float], ...]
    """The likeliest tokens and their probabilities, in falling order."""


@dataclass(frozen=True)
class Token:
    """One position of a row that is not padding."""

    text: str
    segment: int
    prediction: Prediction | None
    """None if no target is stored for this token: a document's first token, or a prompt."""


def row_tokens(cache: Cache, row: int, tokenizer: Tokenizer, *, top: int) -> list[Token]:
    """The tokens of a row, each with the `top` likeliest tokens that the teacher predicted."""
    batch = {name: array[0] for name, array in cache.read([row]).items()}
    scored = np.flatnonzero(batch["loss_mask"])
    ids, logprobs = batch["topk_ids"][scored], batch["topk_logprobs"][scored]
    entropy = entropies(logprobs, batch["tail_logmass"][scored])
    tails = np.exp(batch["tail_logmass"][scored, -1])
    predictions: dict[int, Prediction] = {}
    for i, at in enumerate(scored):
        following = int(batch["tokens"][at + 1])
        place = np.flatnonzero(ids[i] == following)
        likeliest = zip(ids[i][:top], np.exp(logprobs[i][:top]), strict=True)
        predictions[int(at) + 1] = Prediction(
            entropy=float(entropy[i]),
            tail=float(tails[i]),
            probability=float(np.exp(logprobs[i][place[0]])) if len(place) else None,
            alternatives=tuple((tokenizer.decode([j]), float(p)) for j, p in likeliest),
        )
    return [
        Token(tokenizer.decode([token]), int(segment), predictions.get(at))
        for at, (token, segment) in enumerate(
            zip(batch["tokens"], batch["segment_ids"], strict=True)
        )
        if segment != PADDING
    ]


def row_table(tokens: Sequence[Token]) -> Table:
    """The tokens and their predictions, for the terminal."""
    table = Table("token", "p", "entropy", "tail", "the teacher's likeliest", show_lines=False)
    for token in tokens:
        prediction = token.prediction
        if prediction is None:
            table.add_row(_visible(token.text), "", "", "", "", style="dim")
            continue
        likely = Text("  ").join(
            Text.assemble(_visible(text), f" {p:.2f}") for text, p in prediction.alternatives
        )
        p = "–" if prediction.probability is None else f"{prediction.probability:.3f}"
        entropy, tail = f"{prediction.entropy:.2f}", f"{prediction.tail:.3f}"
        table.add_row(_visible(token.text), p, entropy, tail, likely)
    return table


def document_origins(cache: Cache, row: int) -> list[str]:
    """Source file and place of each document in a row; forgotten documents are left out."""
    return [
        f"{name}, document {document}, from its token {start} on"
        for name, document, start in cache.origins(row)
    ]


def _visible(text: str) -> Text:
    # Not a string, in which Rich would read markup.
    return Text(repr(text)[1:-1])
