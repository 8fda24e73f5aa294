"""Tokenises a stretch of text as its tokenizer does in the middle of a longer text.

Tokenizers with `Spelling.prefix` put a space in front of a text, which is not in the middle of one.
There the stretch is read behind a character that joins none of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from decant.models.text.spelling import Spelling
from decant.models.text.tokenizer import Tokenizer

_ANCHORS = ("\n", "0", "x", "!", "中")
"""Characters to read a stretch behind, tried in this order."""


def encode_inside(
    tokenizer: Tokenizer, texts: Sequence[str], *, spelling: Spelling
) -> list[np.ndarray]:
    """The ids of each text, int32, as in the middle of a longer text.

    A text that joins every character in front of it is tokenised as a text of its own.
    """
    if spelling.prefix == "never" or spelling.drops_spaces:
        return tokenizer.encode_batch(texts)
    made: list[np.ndarray] = [np.empty(0, np.int32)] * len(texts)
    left = [n for n, text in enumerate(texts) if text]
    for anchor in _ANCHORS:
        joined = []
        (alone,) = tokenizer.encode_batch([anchor])
        anchored = tokenizer.encode_batch([anchor + texts[n] for n in left])
        for n, ids in zip(left, anchored, strict=True):
            rest = ids[len(alone) :]
            if spelling.join(rest.tolist()) == texts[n].encode() and ids.tobytes().startswith(
                alone.tobytes()
            ):
                made[n] = rest
            else:
                joined.append(n)
        if not (left := joined):
            break
    for n, ids in zip(left, tokenizer.encode_batch([texts[n] for n in left]), strict=True):
        made[n] = ids
    return made
