"""Bits per byte of held-out text, which compares students with different tokenizers.

    bits per byte = Σ CE / (ln 2 · B)

Σ CE is the cross-entropy in nats of all counted labels, and B the number of bytes that these labels
spell. A special token spells 0 bytes, but its cross-entropy counts: a student pays for ending a
document. Labels count whether a teacher's target is stored for their position or not, because an
aligned cache lacks targets at other positions for each tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int, Shaped

from decant.models.text.spelling import token_spelling
from decant.models.text.tokenizer import tokenizer_of
from decant.schemas import Cache
from decant.schemas.records.rows import next_tokens


def bytes_of_ids(cache: Cache) -> Int[np.ndarray, " vocabulary"] | None:
    """The number of bytes that each id of the cache's tokenizer spells.

    None if the tokenizer is missing, or does not keep the text's bytes: it lowercases, or has no
    tokens for spaces.
    """
    try:
        spelling = token_spelling(tokenizer_of(cache))
    except (FileNotFoundError, ValueError):
        return None
    if spelling.drops_spaces:
        return None
    sizes = np.zeros(cache.manifest.vocabulary_size, np.int64)
    lengths = [len(each or b"") for each in spelling.bytes[: len(sizes)]]
    sizes[: len(lengths)] = lengths
    return sizes


def label_bytes(
    batch: Mapping[str, Shaped[np.ndarray, ...]],
    sizes: Int[np.ndarray, " vocabulary"] | None,
) -> int:
    """Bytes that the counted labels of a batch from `Cache.read` spell; 0 without `sizes`."""
    if sizes is None:
        return 0
    return int(sizes[next_tokens(batch["tokens"])[batch["loss_mask"]]].sum())


def bits_per_byte(ce: float, count: int, *, prefix: str) -> dict[str, float]:
    """`bits_per_byte` with its prefix, from a sum of cross-entropies in nats; empty if no byte is
    known."""
    return {f"{prefix}bits_per_byte": ce / (math.log(2) * count)} if count else {}
