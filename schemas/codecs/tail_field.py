"""Codecs of the tail's log-mass at the nodes β > 0.

The node β = 0 is not stored, because it counts the tail's ids. `EXACT_EIGHTHS` keeps the float32
bits of nine nodes, `EXACT` (the only exact codec of 0.3) of seven. `QUANTISED` stores seven nodes
as multiples of 1/32 nat. Each node is stored as its difference from a prediction by the tail's
size, the last stored log-probability and the nodes before it.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer

from decant.schemas.codecs.block import Tables
from decant.schemas.codecs.streams import (
    by_position,
    cells,
    compress,
    decompress,
    escape,
    fill_columns,
    gather_columns,
    grid,
    join,
    split,
    unescape,
)
from decant.schemas.targets.targets import BETAS, EIGHTHS, tail_size_logmass

EXACT = 1
QUANTISED = 2
EXACT_EIGHTHS = 3
_NODES_OF = {EXACT: BETAS, EXACT_EIGHTHS: EIGHTHS}

PER_NAT = 32
_NODES = len(BETAS) - 1
_GIVEN = 3
"""Predictors of the first node: a constant, the tail's size, the level of the last stored entry."""
_FRACTION = 4096
"""Denominator of the integer coefficients. Their products are exact in float64, so that a matrix
product gives equal predictions on every machine."""
_LARGEST = 32767
_MINUS_INFINITY = -32768


def exact_codec(values: Float[np.ndarray, "n nodes"]) -> int:
    """The id of the codec of `encode_exact` for this number of nodes."""
    return {len(nodes): codec for codec, nodes in _NODES_OF.items()}[values.shape[1]]


def encode_exact(values: Float[np.ndarray, "n nodes"]) -> bytes:
    """The payload: float32 bits of the nodes β > 0, by byte plane."""
    planes = np.ascontiguousarray(values[:, 1:], "<f4").view(np.uint8)
    return compress(np.ascontiguousarray(planes.T))


def decode_exact(
    payloads: Sequence[bytes], *, codec: int, positions: Sequence[int], k: int, vocabulary: int
) -> Float[np.ndarray, "n nodes"]:
    """The nodes that `encode_exact` was given, records one after another."""
    bytes_each = 4 * (len(_NODES_OF[codec]) - 1)
    planes = grid(bytes_each, positions)
    for cell, payload, n in zip(cells(positions), payloads, positions, strict=True):
        fill_columns(planes[:, cell], decompress([payload], sizes=[bytes_each * n]), [n])
    nodes = by_position(planes, positions).view("<f4")
    return _with_count(nodes.T, vocabulary=vocabulary, k=k)


def fit(
    values: Float[np.ndarray, "n 7"],
    *,
    last: Integer[np.ndarray, " n"],
    sizes: Integer[np.ndarray, " n"],
    vocabulary: int,
) -> dict[str, np.ndarray]:
    """The table `tail`: prediction coefficients by least squares, int32 [nodes, 3 + nodes].

    `last` is the level of each position's last stored log-probability, `sizes` its number of ids.
    """
    finite = np.isfinite(values).all(1)
    predictors = _predictors(last[finite], vocabulary=vocabulary, k=sizes[finite])
    predictors[_GIVEN:] = _quantise(values[finite])
    coefficients = np.zeros((_NODES, _GIVEN + _NODES), np.int32)
    for node in range(_GIVEN, _GIVEN + _NODES):
        given, target = predictors[:node], predictors[node]
        # The ridge matters only where the sample leaves coefficients undetermined.
        gram = given @ given.T + np.eye(node)
        exact = np.linalg.solve(gram, given @ target)
        coefficients[node - _GIVEN, :node] = np.rint(np.clip(exact, -999, 999) * _FRACTION)
    return {"tail": coefficients}


def encode_quantised(
    values: Float[np.ndarray, "n 7"],
    *,
    last: Integer[np.ndarray, " n"],
    tables: Tables,
    vocabulary: int,
    k: int,
) -> bytes:
    """The payload: escapes, then a frame per node of differences from the prediction, as bytes.

    `last` is the level of each position's last stored log-probability.
    """
    if k == vocabulary:
        return b""
    predictors = _predictors(last, vocabulary=vocabulary, k=k)
    predictors[_GIVEN:] = _quantise(values)
    residual = np.empty((_NODES, len(values)), np.int64)
    for node, coefficients in enumerate(_coefficients(tables)):
        residual[node] = predictors[_GIVEN + node] - _predict(predictors, coefficients)
    codes, escapes = escape(residual << 1 ^ residual >> 63, dtype="<u4")
    return join([escapes, *map(compress, codes)])


def decode_quantised(
    payloads: Sequence[bytes],
    *,
    positions: Sequence[int],
    last: Integer[np.ndarray, " n"],
    tables: Tables,
    vocabulary: int,
    k: int,
) -> Float[np.ndarray, "n 7"]:
    """The nodes as multiples of 1/32 nat, float32, records one after another; not normalised.

    `last` is as in `encode_quantised`.
    """
    if k == vocabulary:
        if any(payloads):
            raise ValueError(f"{max(map(len, payloads))} bytes for an empty tail")
        return np.full((len(last), len(BETAS)), -np.inf, np.float32)
    codes, escapes = grid(_NODES, positions), []
    for cell, payload, n in zip(cells(positions), payloads, positions, strict=True):
        own_escapes, *frames = split(payload, count=1 + _NODES)
        escapes.append(own_escapes)
        fill_columns(codes[:, cell], decompress(frames, sizes=_NODES * [n]), [n])
    folded = gather_columns(unescape(codes, escapes, columns=positions, dtype="<u4"), positions)
    folded = folded.astype(np.int16 if folded.dtype == np.uint8 else np.int64)
    predictors = _predictors(last, vocabulary=vocabulary, k=k)
    levels = predictors[_GIVEN:]
    levels[...] = folded >> 1 ^ -(folded & 1)
    for level, coefficients in zip(levels, _coefficients(tables), strict=True):
        level += _predict(predictors, coefficients)
    least = levels.min()
    if levels.max() > _LARGEST or least < _MINUS_INFINITY:
        raise ValueError("tail log-mass outside its range")
    nodes = levels.astype(np.float32)
    nodes *= np.float32(1 / PER_NAT)
    if least == _MINUS_INFINITY:
        nodes[levels == _MINUS_INFINITY] = -np.inf
    return _with_count(nodes, vocabulary=vocabulary, k=k)


def _with_count(nodes: Float[np.ndarray, "nodes n"], *, vocabulary: int, k: int) -> np.ndarray:
    """`nodes` with A(0) before them: float32 [n, nodes + 1], laid out [nodes + 1, n] in memory."""
    values = np.empty((len(nodes) + 1, nodes.shape[1]), np.float32)
    values[0] = tail_size_logmass(vocabulary=vocabulary, k=k)
    values[1:] = nodes
    return values.T


def _predictors(
    last: Integer[np.ndarray, " n"], *, vocabulary: int, k: int | Integer[np.ndarray, " n"]
) -> Float[np.ndarray, "9 n"]:
    """The predictors as integers in float64, with room for the six nodes."""
    predictors = np.zeros((_GIVEN + _NODES, len(last)))
    predictors[0] = PER_NAT
    predictors[1] = np.rint(PER_NAT * np.log(np.maximum(vocabulary - k, 1)))
    predictors[2] = last
    return predictors


def _quantise(values: Float[np.ndarray, "n 7"]) -> Float[np.ndarray, "6 n"]:
    nodes = values[:, 1:].T
    if np.isnan(nodes).any():
        raise ValueError("a tail log-mass is NaN; a row with NaN must not be encoded")
    levels = np.clip(np.rint(nodes * np.float64(PER_NAT)), _MINUS_INFINITY + 1, _LARGEST)
    return np.where(nodes == -np.inf, _MINUS_INFINITY, levels)


def _coefficients(tables: Tables) -> list[Float[np.ndarray, " known"]]:
    """The coefficients of each node, one per predictor that is known before it."""
    rows = tables["tail"] / _FRACTION
    return [row[: _GIVEN + node] for node, row in enumerate(rows)]


def _predict(predictors: Float[np.ndarray, "9 n"], coefficients: Float[np.ndarray, " before"]):
    return np.floor(coefficients @ predictors[: len(coefficients)] + 0.5)
