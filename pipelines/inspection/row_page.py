"""A row as a web page that needs nothing else: coloured tokens, alternatives, attention, norms."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from decant.pipelines.inspection.contents import Token
from decant.schemas import Cache
from decant.schemas.signals import AttentionSignal, HiddenSignal
from decant.schemas.targets.attention import encode_log

_MOST_BYTES = 24 << 20
"""Of attention maps in a page; beyond it, a layer's heads are averaged, then layers left out."""


def row_page(cache: Cache, row: int, tokens: Sequence[Token]) -> str:
    """The page of a row, HTML."""
    maps, left_out = _attention(cache, row, length=len(tokens))
    data = {
        "tokens": [_token(token) for token in tokens],
        "attention": maps,
        "norms": _norms(cache, row, length=len(tokens)),
    }
    # "</script>" in a corpus must not end the script.
    embedded = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    title = f"row {row} of {cache.path.name}"
    notes = [f"cache {cache.manifest.cache_id[:12]}", f"{len(tokens)} tokens", *left_out]
    page = (Path(__file__).parent / "row_page.html").read_text("utf-8")
    return (
        page.replace("{{title}}", html.escape(title))
        .replace("{{notes}}", html.escape(" · ".join(notes)))
        .replace("{{data}}", embedded)
    )


def _token(token: Token) -> dict[str, Any]:
    found: dict[str, Any] = {"text": token.text, "segment": token.segment}
    if said := token.prediction:
        found |= {
            "entropy": round(said.entropy, 3),
            "tail": round(said.tail, 4),
            "p": None if said.probability is None else round(said.probability, 5),
            "likely": [[text, round(p, 4)] for text, p in said.alternatives],
        }
    return found


def _attention(cache: Cache, row: int, *, length: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Maps of every stored layer as base64 of uint8-log codes [heads, length, length]."""
    signals = cache.manifest.signals
    names = [name for name, signal in signals.items() if isinstance(signal, AttentionSignal)]
    found, left_out, used = [], [], 0
    for name in names:
        maps = cache.read([row], signals=(name,))[name][0].astype(np.float32)
        maps = maps[:, :length, :length]
        if used + maps.size > _MOST_BYTES:
            maps = maps.mean(axis=0, keepdims=True)
            left_out.append(f"{name}: the mean of its heads, all would be too large for a page")
        if used + maps.size > _MOST_BYTES:
            left_out[-1] = f"{name}: left out, too large for a page"
            continue
        used += maps.size
        codes = base64.b64encode(encode_log(maps).tobytes()).decode()
        found.append({"name": name, "heads": len(maps), "codes": codes})
    return found, left_out


def _norms(cache: Cache, row: int, *, length: int) -> dict[str, list[float]]:
    """Euclidean norm of every stored layer's states, by signal."""
    found = {}
    for name, signal in cache.manifest.signals.items():
        if isinstance(signal, HiddenSignal):
            states = cache.read([row], signals=(name,))[name][0, :length].astype(np.float32)
            norms = np.linalg.norm(states, axis=-1)
            found[name] = [round(float(norm), 3) for norm in norms]
    return found
