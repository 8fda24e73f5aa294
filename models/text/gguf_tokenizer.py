"""Rebuilding a Hugging Face tokenizer from GGUF metadata.

GGUF stores the tokens and merges of a byte-level BPE, but only the *name* of the rule that splits
text before merging. A wrong rule would give plausible but different ids, so an unknown name is an
error. Of SentencePiece it stores tokens and scores: see `gguf_sentencepiece.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from decant.models.text.gguf_sentencepiece import UNKNOWN, sentencepiece_parts

# Values of tokenizer.ggml.token_type.
CONTROL, USER_DEFINED = 3, 4

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
# GPT-2's expression, which is built into the ByteLevel pre-tokenizer.
GPT2 = [BYTE_LEVEL | {"use_regex": True}]
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _split(expression: str) -> list[dict[str, Any]]:
    """Pre-tokenizers that split text by a regular expression, then map bytes to characters."""
    pattern = {"Regex": expression}
    return [
        {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL,
    ]


def _words(digits: str) -> list[dict[str, Any]]:
    """The expression of GPT-4 and its successors; `digits` matches one group of digits."""
    return _split(
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _cased_words(digits: str, *, ending: str) -> list[dict[str, Any]]:
    """The expression of GPT-4o and of Tekken, which splits words where lower case ends."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    first = r"[^\r\n\p{L}\p{N}]?"
    return _split(
        rf"{first}{upper}*{lower}+{ending}|{first}{upper}+{lower}*{ending}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


SINGLE_DIGITS = [{"type": "Digits", "individual_digits": True}, *GPT2]
LLAMA3 = _words(r"\p{N}{1,3}")
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": GPT2,
    "gpt2": GPT2,
    "smollm": SINGLE_DIGITS,
    "starcoder": SINGLE_DIGITS,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": _words(r"\p{N}"),
    "olmo": GPT2,
    "refact": SINGLE_DIGITS,
    "dbrx": LLAMA3,
    "tekken": _cased_words(r"\p{N}", ending=""),
    "gpt-4o": _cased_words(r"\p{N}{1,3}", ending=f"{CONTRACTIONS}?"),
}
NFC = ("qwen2", "olmo")
"""Rules of models whose texts are composed (Unicode's form C) first."""
# Llama 3 and Tekken keep a word that is a token whole, even if no merges lead to it. They start
# every text with BOS unless the file says otherwise.
WHOLE_WORDS_AND_BOS = ("llama-bpe", "llama3", "llama-v3", "tekken")
SENTENCEPIECE = "llama"


def tokenizer_files(metadata: Mapping[str, Any], *, where: str) -> dict[str, bytes]:
    """The tokenizer's files by name, made from the `tokenizer.*` metadata.

    ValueError for another kind of tokenizer, an unknown pre-tokenizer or missing metadata. `where`
    names the file in errors.
    """
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model not in ("gpt2", SENTENCEPIECE):
        raise ValueError(
            f"{where}: tokenizer.ggml.model is {model!r}; only byte-level BPE ('gpt2') and "
            "SentencePiece BPE ('llama') can be rebuilt. Use the model's Hugging Face directory "
            "instead."
        )
    tokens, kinds = _list(metadata, "tokens", where), _list(metadata, "token_type", where, of=int)
    if len(tokens) != len(kinds):
        raise ValueError(f"{where}: {len(tokens)} tokens, but {len(kinds)} token types")
    names = _special_names(metadata, tokens, where)
    begins = model == SENTENCEPIECE or pre in WHOLE_WORDS_AND_BOS
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", begins))
    if add_bos and "bos_token" not in names:
        raise ValueError(f"{where}: texts begin with BOS, but there is no bos_token_id")
    if model == SENTENCEPIECE:
        scores = _list(metadata, "scores", where, of=float)
        if len(scores) != len(tokens):
            raise ValueError(f"{where}: {len(tokens)} tokens, but {len(scores)} scores")
        parts = sentencepiece_parts(metadata, tokens, kinds, scores, where=where)
    else:
        parts = _byte_level_parts(metadata, tokens, where=where)
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        # A byte-level BPE knows every text; SentencePiece has a token for what it does not know.
        "added_tokens": _added_tokens(
            tokens, kinds, special=(CONTROL, UNKNOWN) if model == SENTENCEPIECE else (CONTROL,)
        ),
        "post_processor": _prepend(names["bos_token"], tokens) if add_bos else None,
        **parts,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        **names,
    }
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    files = {
        "tokenizer.json": json.dumps(definition, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2).encode(),
    }
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    if any(end is not None for end in ends[1:]):
        ids = [end for end in ends if end is not None]
        files["generation_config.json"] = json.dumps({"eos_token_id": ids}).encode()
    return files


def _byte_level_parts(
    metadata: Mapping[str, Any], tokens: list[str], *, where: str
) -> dict[str, Any]:
    """The model, normalizer, pre-tokenizer and decoder of a byte-level BPE's tokenizer.json."""
    pre = metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"{where}: tokenizer.ggml.pre is {pre!r}, a pre-tokenizer that we do not know; known: "
            f"{', '.join(PRE_TOKENIZERS)}. Guessing would give other token ids."
        )
    return {
        "normalizer": {"type": "NFC"} if pre in NFC else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in WHOLE_WORDS_AND_BOS,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in _list(metadata, "merges", where)],
        },
    }


def _list(metadata: Mapping[str, Any], name: str, where: str, *, of: type = str) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list):
        raise ValueError(f"{where}: metadata has no tokenizer.ggml.{name}; no tokenizer in it.")
    if not all(isinstance(item, of) for item in value):
        raise ValueError(f"{where}: tokenizer.ggml.{name} holds items other than {of.__name__}")
    return value


def _special_names(metadata: Mapping[str, Any], tokens: list[str], where: str) -> dict[str, str]:
    """Name ("eos_token") → text of each special token whose id the metadata gives."""
    ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    names: dict[str, str] = {}
    for ours, theirs in ids.items():
        key = f"tokenizer.ggml.{theirs}_token_id"
        if key not in metadata:
            continue
        if metadata[key] not in range(len(tokens)):
            raise ValueError(f"{where}: {key} is {metadata[key]}, of {len(tokens)} tokens")
        names[f"{ours}_token"] = tokens[metadata[key]]
    return names


def _added_tokens(
    tokens: list[str], kinds: list[int], *, special: tuple[int, ...]
) -> list[dict[str, Any]]:
    """The tokens that are matched in a text before it is split; `special` are kinds of token."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, **flags, "special": kind in special}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (*special, USER_DEFINED)
    ]


def _prepend(token: str, tokens: list[str]) -> dict[str, Any]:
    """The post-processor that puts `token` in front of every text."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, second],
        "special_tokens": {token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]}},
    }
