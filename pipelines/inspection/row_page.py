"""One row as a self-contained web page: coloured tokens, alternatives, attention, norms."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from decant.foreign import escaped, page
from decant.pipelines.inspection.row import Token
from decant.schemas import Cache
from decant.schemas.signals import AttentionSignal, HiddenSignal
from decant.schemas.targets.attention import encode_log

_MOST_BYTES = 24 << 20
"""Of attention maps in a page. Beyond it, a layer's heads are averaged, or the layer left out."""


def row_page(cache: Cache, row: int, tokens: Sequence[Token]) -> str:
    """HTML of the page for row `row`, whose `tokens` come from `row_tokens`."""
    maps, notes_on_maps = _attention(cache, row, length=len(tokens))
    data = {
        "tokens": [_token(token) for token in tokens],
        "attention": maps,
        "norms": _norms(cache, row, length=len(tokens)),
    }
    # "<" is escaped, so that "</script>" in a corpus does not end the script.
    embedded = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    title = f"row {row} of {cache.path.name}"
    notes = [f"cache {cache.manifest.cache_id[:12]}", f"{len(tokens)} tokens", *notes_on_maps]
    template = (Path(__file__).parent / "row_page.html").read_text("utf-8")
    values = {"title": escaped(title), "notes": escaped(" · ".join(notes)), "data": embedded}
    return page(template, values)


def _token(token: Token) -> dict[str, Any]:
    value: dict[str, Any] = {"text": token.text, "segment": token.segment}
    if prediction := token.prediction:
        p = prediction.probability
        value |= {
            "entropy": round(prediction.entropy, 3),
            "tail": round(prediction.tail, 4),
            "p": None if p is None else round(p, 5),
            "likely": [[text, round(p, 4)] for text, p in prediction.alternatives],
        }
    return value


def _attention(cache: Cache, row: int, *, length: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Maps of every stored layer, and notes on layers that are averaged or left out.

    A map is base64 of uint8-log codes [heads, length, length].
    """
    signals = cache.manifest.signals
    names = [name for name, signal in signals.items() if isinstance(signal, AttentionSignal)]
    layers, notes, used = [], [], 0
    for name in names:
        maps = cache.read([row], signals=(name,))[name][0].astype(np.float32)
        maps = maps[:, :length, :length]
        if used + maps.size > _MOST_BYTES:
            maps = maps.mean(axis=0, keepdims=True)
            notes.append(f"{name}: the mean of its heads, all would be too large for a page")
        if used + maps.size > _MOST_BYTES:
            notes[-1] = f"{name}: left out, too large for a page"
            continue
        used += maps.size
        codes = base64.b64encode(encode_log(maps).tobytes()).decode()
        layers.append({"name": name, "heads": len(maps), "codes": codes})
    return layers, notes


def _norms(cache: Cache, row: int, *, length: int) -> dict[str, list[float]]:
    """Euclidean norm of the states of every stored layer at each position, by signal name."""
    norms_by_signal = {}
    for name, signal in cache.manifest.signals.items():
        if isinstance(signal, HiddenSignal):
            states = cache.read([row], signals=(name,))[name][0, :length].astype(np.float32)
            norms = np.linalg.norm(states, axis=-1)
            norms_by_signal[name] = [round(float(norm), 3) for norm in norms]
    return norms_by_signal
