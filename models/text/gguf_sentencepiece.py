"""A SentencePiece BPE, as GGUF files store it, as a Hugging Face tokenizer.

SentencePiece has no list of merges: of all neighbours that together are a token, it joins those
whose token has the highest score. So every way to split a token into two tokens is a merge, in the
order of the tokens' scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_LONGEST = 512
"""Characters of a token that merges can lead to. SentencePiece makes none of more than 16."""
NORMAL, UNKNOWN, USER_DEFINED = 1, 2, 4
SPACE = "▁"


def sentencepiece_parts(
    metadata: Mapping[str, Any],
    tokens: Sequence[str],
    kinds: Sequence[int],
    scores: Sequence[float],
    *,
    where: str,
) -> dict[str, Any]:
    """The model, normalizer, pre-tokenizer and decoder of tokenizer.json.

    A text begins with a space unless the metadata denies it, as do the parts of a text after
    special tokens. ValueError if the metadata says that texts are normalised before.
    """
    for name in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if metadata.get(f"tokenizer.ggml.{name}"):
            raise ValueError(
                f"{where}: tokenizer.ggml.{name} is set, so texts are changed before they are "
                "split, which cannot be rebuilt. Use the model's Hugging Face directory instead."
            )
    prefixed = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if prefixed else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    unknown = [token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown[0] if unknown else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _merges(tokens, kinds, scores),
        },
    }


def _merges(
    tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float]
) -> list[list[str]]:
    """Every pair of tokens that is a token, the highest score of the joined token first."""
    joinable = {
        token: number
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (NORMAL, USER_DEFINED) and len(token) <= _LONGEST
    }
    found = []
    for token, number in joinable.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in joinable and right in joinable:
                order = (-scores[number], joinable[left], joinable[right])
                found.append((order, [left, right]))
    return [merge for _, merge in sorted(found)]
