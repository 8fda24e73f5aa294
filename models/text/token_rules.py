"""The rules of a tokenizer that decide the ids of a text, in one spelling.

tokenizer.json can write one rule in several ways: merges as "a b" or ["a", "b"], defaults in full
or left out, one step alone or in a sequence. Programs that save a tokenizer change them. Here equal
rules are equal, and whatever cannot change an id is left out: the decoder, padding, truncation,
tokens that no text gives. Rules that differ are never spelt alike; at worst two spellings of one
rule remain two.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

from decant.models.text.backend import Backend

Rules = dict[str, Any]
"""What `token_rules` returns: JSON values by the names in `_ORDER`."""

# Splits as the ByteLevel pre-tokenizer does if use_regex is set.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_SPLIT = {"type": "Split", "pattern": {"Regex": _GPT2}, "behavior": "Isolated"}
_BYTES = frozenset(tokenizers.pre_tokenizers.ByteLevel.alphabet())
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
_ORDER = ("merges", "added_tokens", "vocabulary", "normalizer", "pre_tokenizer", "model")
"""The rules in the order in which a difference is looked for."""


def token_rules(definition: Mapping[str, Any], backend: Backend) -> Rules:
    """The rules of a parsed tokenizer.json that `backend` has accepted."""
    steps = {name: [*flat_steps(step)] for name, step in backend.steps().items()}
    added = _added_tokens(backend, normalised=bool(steps["normalizer"]))
    written = definition["model"]
    model = _without_defaults(
        {k: v for k, v in written.items() if k not in ("vocab", "merges", "dropout")}
    ) | {"type": backend.model_name()}
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in _merges(written)]
    vocabulary = written.get("vocab") or {}
    if model["type"] == "BPE":
        for affix in _AFFIXES:
            if not model.get(affix):
                model.pop(affix, None)
        if _spells_every_byte(steps["pre_tokenizer"], vocabulary, model):
            for never_used in ("unk_token", "fuse_unk", "byte_fallback"):
                model.pop(never_used, None)
        vocabulary = _reachable(vocabulary, merges, model, added, steps)
    elif isinstance(vocabulary, list):  # Unigram: a token's id is its place
        vocabulary = [[token, float(score)] for token, score in vocabulary]
    return {
        "model": model,
        **steps,
        "vocabulary": vocabulary,
        "merges": [list(merge) for merge in merges],
        "added_tokens": added,
    }


def difference(ours: Rules, theirs: Rules, *, names: tuple[str, str]) -> str | None:
    """The first difference, in words; None if every text has the same ids.

    `names` say whose rules they are.
    """
    here, there = _spellings(ours), _spellings(theirs)
    for token_id in sorted(here.keys() | there.keys()):
        mine, other = here.get(token_id), there.get(token_id)
        if mine != other:
            what, sides = f"id {token_id}", (mine, other)
            break
    else:
        differing = (name for name in _ORDER if ours[name] != theirs[name])
        if (what := next(differing, None)) is None:
            return None
        sides = _first_difference(ours[what], theirs[what])
    (one, other), (a, b) = names, sides
    return f"{what}: {_shown(a)} in {one}, {_shown(b)} in {other}"


def flat_steps(step: Any) -> Iterator[dict[str, Any]]:
    """The steps in order, without sequences, in the spelling that has the fewest fields.

    `step` is one of `Backend.steps`.
    """
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step.get("normalizers", step.get("pretokenizers")):
            yield from flat_steps(inner)
        return
    step = _without_defaults(step)
    if step["type"] == "ByteLevel":
        step.pop("trim_offsets", None)  # moves spans, not ids
        # With a space in front, the space is there before the text is split.
        if step.get("use_regex") and not step.get("add_prefix_space"):
            del step["use_regex"]
            yield _GPT2_SPLIT
    yield step


def _without_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those that say no; the library fills in all that says yes."""
    return {
        name: value for name, value in fields.items() if value is not None and value is not False
    }


def _merges(model: Mapping[str, Any]) -> list[Any]:
    """The merges by rank. Files of the first releases began with a comment."""
    merges = model.get("merges") or []
    return [m for m in merges if not (isinstance(m, str) and m.startswith("#version"))]


def _added_tokens(backend: Backend, *, normalised: bool) -> dict[str, list[Any]]:
    """Token → its id and the flags that decide where it is found.

    `special` decides nothing: special tokens are found in a text like all others.
    """
    tokens = backend.added_tokens()
    # Tokens with the flag are sought after normalisation and after those without. Without a
    # normaliser this matters only if there are some of both.
    alike = len({token.normalized for token in tokens.values()}) < 2
    return {
        token.content: [
            token_id,
            token.single_word,
            token.lstrip,
            token.rstrip,
            token.normalized and not (alike and not normalised),
        ]
        for token_id, token in tokens.items()
    }


def _spells_every_byte(
    pre_tokenizer: list[dict[str, Any]], vocabulary: Mapping[str, int], model: Mapping[str, Any]
) -> bool:
    """Whether the model only meets characters that are tokens: no text is unknown to it."""
    last = pre_tokenizer[-1]["type"] if pre_tokenizer else None
    affixed = any(affix in model for affix in _AFFIXES)
    return last == "ByteLevel" and not affixed and vocabulary.keys() >= _BYTES


def _reachable(
    vocabulary: Mapping[str, int],
    merges: list[tuple[str, ...]],
    model: Mapping[str, Any],
    added: Mapping[str, Any],
    steps: Mapping[str, list[Any]],
) -> dict[str, int]:
    """The tokens that BPE can give: files may list others, such as padding of the vocabulary."""
    if any(affix in model for affix in _AFFIXES):
        return dict(vocabulary)
    if model.get("ignore_merges"):
        # Any token may be a whole word, unless it is found before the text is split. Bytes of ASCII
        # stand for themselves. A single_word token that is not found hides others inside it.
        sought = not steps["normalizer"] and not any(fields[1] for fields in added.values())
        found = {token for token in added if sought and re.fullmatch("[!-~]+", token)}
        return {token: i for token, i in vocabulary.items() if token not in found}
    made = {"".join(merge) for merge in merges} | {model.get("unk_token")}
    fallback = model.get("byte_fallback")
    return {
        token: i
        for token, i in vocabulary.items()
        if len(token) == 1 or token in made or (fallback and token.startswith("<0x"))
    }


def _spellings(rules: Rules) -> dict[int, str]:
    """Id → token, of all tokens that a text can give."""
    vocabulary = rules["vocabulary"]
    if isinstance(vocabulary, list):
        spellings = dict(enumerate(token for token, _ in vocabulary))
    else:
        spellings = {token_id: token for token, token_id in vocabulary.items()}
    return spellings | {fields[0]: token for token, fields in rules["added_tokens"].items()}


def _first_difference(ours: Any, theirs: Any) -> tuple[Any, Any]:
    """The first items that differ, of two lists or two mappings."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                one, other = ({key: each[key]} if key in each else None for each in (ours, theirs))
                return one, other
    pairs = itertools.zip_longest(
        *(each if isinstance(each, list) else [] for each in (ours, theirs))
    )
    return next((pair for pair in pairs if pair[0] != pair[1]), (ours, theirs))


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
