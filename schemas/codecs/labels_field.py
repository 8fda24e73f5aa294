"""Codecs of the log-probability of the text's next token.

`EXACT` keeps the float32 bits. `QUANTISED` stores multiples of 1/32 nat, so that the error is at
most 1/64.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from decant.schemas.codecs import numbers
from decant.schemas.codecs.block import LABELS, Block
from decant.schemas.codecs.planes import decode_planes, encode_planes
from decant.schemas.codecs.streams import (
    cells,
    compress,
    decompress,
    fill_columns,
    gather_columns,
    grid,
    join,
    split,
)

EXACT = 1
QUANTISED = 2

PER_NAT = 32
_MOST = (1 << 24) - 2
_ABSENT = _MOST + 1
"""The level of log 0."""


def encode(values: Float[np.ndarray, " n"], *, exact: bool) -> Block:
    """The block of one record, of log-probabilities in nats. ValueError for NaN, unless `exact`."""
    if exact:
        return Block(LABELS, EXACT, encode_planes(values[:, None]))
    if np.isnan(values).any():
        raise ValueError("a label's log-probability is NaN; a row with NaN must not be encoded")
    # log p of a certain token may exceed 0 by rounding.
    levels = np.clip(np.rint(values.astype(np.float64) * -PER_NAT), 0, _MOST)
    levels[values == -np.inf] = _ABSENT
    symbols, raw = numbers.encode(levels.astype(np.int32))
    return Block(LABELS, QUANTISED, join([raw, compress(symbols)]))


def decode(blocks: Sequence[Block], *, positions: Sequence[int]) -> Float[np.ndarray, " total"]:
    """Log-probabilities in nats, records one after another; record i has `positions[i]` of them.

    ValueError for payloads that are damaged or of a codec unknown to this release.
    """
    payloads = [block.payload for block in blocks]
    codec = blocks[0].codec
    if codec == EXACT:
        values = decode_planes(payloads, positions=positions, width=1)[:, 0]
        if np.isnan(values).any():
            raise ValueError("a label's log-probability is NaN")
        return values
    if codec != QUANTISED:
        raise ValueError(
            f"codec {codec} of labels is unknown to this release: a newer one wrote it"
        )
    symbols, raw = grid(1, positions), []
    for cell, payload, n in zip(cells(positions), payloads, positions, strict=True):
        own_raw, frame = split(payload, count=2)
        raw.append(own_raw)
        fill_columns(symbols[:, cell], decompress([frame], sizes=[n]), [n])
    levels = gather_columns(numbers.decode(symbols, raw), positions)[0]
    if levels.max(initial=0) > _ABSENT:
        raise ValueError(f"level {levels.max()} of a label's log-probability, beyond {_ABSENT}")
    values = levels.astype(np.float32) * np.float32(-1 / PER_NAT)
    values[levels == _ABSENT] = -np.inf
    return values
