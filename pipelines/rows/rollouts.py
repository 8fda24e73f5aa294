"""Rollouts: texts that a model wrote, with the log-probability that it gave to each token.

    {"prompt": …, "completion": …, "logprobs": […]}
    and, if they are known, "prompt_ids", "completion_ids", "writer", "tokenizer"

Logs are natural, of probabilities at T = 1 over the whole vocabulary. With ids nothing is tokenised
again: what a model wrote need not be how the tokenizer spells it. Without ids, the prompt and the
completion are tokenised apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decant.models.text.tokenizer import Tokenizer
from decant.schemas.disk.identity import canonical_json

LOGPROBS, PROMPT_IDS, COMPLETION_IDS = "logprobs", "prompt_ids", "completion_ids"
WRITER, TOKENIZER = "writer", "tokenizer"
FIELDS = (LOGPROBS, PROMPT_IDS, COMPLETION_IDS, WRITER, TOKENIZER)
"""The fields of a record besides `prompt` and `completion`."""
VERSION = 2
"""Part of the rows_id of corpora with rollouts. Raise it if their rows change.
1, of release 0.13, held out rollouts one by one; now all rollouts of a prompt are in one split."""
VERSIONS = (VERSION, 1)
"""All versions that a cache may have been begun with, newest first."""
MOST_WRITERS = 1000
"""The manifest lists their names."""
_LONGEST_NAME = 200
_ROUNDING = 1e-3
"""A log-probability above 0 by at most this is an inexact 0."""
_MOST_ID = (1 << 31) - 1


@dataclass(frozen=True, eq=False)
class Rollout:
    """A prompt, and what a model wrote after it."""

    prompt: str
    completion: str
    logprobs: np.ndarray
    """float32, one a token of the completion, its end token included if it wrote one."""
    prompt_ids: np.ndarray | None = None
    """int32: all that the model was given, with BOS if there was one. None: `prompt`, tokenised."""
    completion_ids: np.ndarray | None = None
    """int32: what the model wrote, with its end token if it wrote one."""
    writer: str = ""
    """Name of the model, such as a digest of its weights; empty if it is unknown."""
    tokenizer: str = ""
    """Digest of the model's tokenizer; empty if it is unknown."""

    @property
    def data(self) -> bytes:
        """All of it, for the content's hash."""
        ids = [self.prompt_ids, self.completion_ids]
        return canonical_json(
            {
                "texts": [self.prompt, self.completion, self.writer, self.tokenizer],
                "ids": [None if one is None else one.tolist() for one in ids],
                # As float32, so that a table and JSON lines of the same rollouts are equal.
                "logprobs": self.logprobs.astype("<f4").tobytes().hex(),
            }
        )


def rollout(prompt: str, completion: str, record: Mapping[str, Any]) -> Rollout:
    """The rollout in a record of these texts. ValueError with the field that is wrong."""
    logprobs = _logprobs(record[LOGPROBS])
    prompt_ids, completion_ids = (_ids(record, name) for name in (PROMPT_IDS, COMPLETION_IDS))
    if completion_ids is not None and len(completion_ids) != len(logprobs):
        raise ValueError(
            f"{len(logprobs)} {LOGPROBS}, but {len(completion_ids)} {COMPLETION_IDS}; expected one "
            "a token, the end token included"
        )
    if not len(logprobs):
        raise ValueError(f"{LOGPROBS} is empty, so there is nothing to learn from")
    writer, tokenizer = (_name(record, name) for name in (WRITER, TOKENIZER))
    return Rollout(prompt, completion, logprobs, prompt_ids, completion_ids, writer, tokenizer)


def _logprobs(values: Any) -> np.ndarray:
    if not isinstance(values, list):
        raise ValueError(
            f"field {LOGPROBS!r} is {type(values).__name__}, not a list of numbers, one a token of "
            "the completion; leave it out to learn from the texts alone"
        )
    for at, value in enumerate(values):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value > _ROUNDING:
            raise ValueError(
                f"{LOGPROBS}[{at}] is {str(value)[:40]}; expected the natural log of a "
                "probability: a finite number, 0 or below"
            )
    with np.errstate(over="ignore"):
        numbers = np.minimum(np.array(values, np.float64), 0).astype(np.float32)
    if np.isinf(numbers).any():
        raise ValueError(f"{LOGPROBS} holds a number that float32 cannot hold")
    return numbers


def _ids(record: Mapping[str, Any], name: str) -> np.ndarray | None:
    values = record.get(name)
    if values is None:
        return None
    if not isinstance(values, list):
        raise ValueError(f"field {name!r} is {type(values).__name__}, not a list of token ids")
    for at, value in enumerate(values):
        if type(value) is not int or not 0 <= value <= _MOST_ID:
            raise ValueError(f"{name}[{at}] is {str(value)[:40]}; expected a token id")
    return np.array(values, np.int32)


def _name(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > _LONGEST_NAME:
        raise ValueError(
            f"field {name!r} is {str(value)[:40]}; expected a text of at most {_LONGEST_NAME} "
            "characters"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {name!r} holds half of a surrogate pair") from None
    return value


@dataclass(frozen=True)
class RolloutTokens:
    """A rollout as tokens: all arrays [n]."""

    tokens: np.ndarray
    counted: np.ndarray
    """True for tokens of the completion."""
    logprobs: np.ndarray
    """float32; NaN for tokens of the prompt."""


def tokens_of(batch: Sequence[Rollout], tokenizer: Tokenizer) -> list[RolloutTokens]:
    """The tokens of rollouts. ValueError for one that does not fit `tokenizer`, the teacher's."""
    for one in batch:
        _require_same_tokenizer(one, tokenizer)
    texts = [
        text
        for one in batch
        for text, ids in ((one.prompt, one.prompt_ids), (one.completion, one.completion_ids))
        if ids is None
    ]
    encoded = iter(tokenizer.encode_batch(texts))
    return [_tokens(one, encoded, tokenizer) for one in batch]


def _require_same_tokenizer(one: Rollout, tokenizer: Tokenizer) -> None:
    if one.tokenizer and not tokenizer.known_as(one.tokenizer):
        raise ValueError(
            f"written by a model with another tokenizer than the teacher's "
            f"({one.tokenizer[:12]}, the teacher's is {tokenizer.digest[:12]}); log-probabilities "
            "of other tokens do not line up. Use a teacher with the model's tokenizer, or leave "
            f"out {LOGPROBS} and ids to learn from the texts alone"
        )


def _tokens(one: Rollout, encoded: Iterator[np.ndarray], tokenizer: Tokenizer) -> RolloutTokens:
    prompt = _prompt(one, encoded, tokenizer)
    completion = _completion(one, encoded, tokenizer, prompt=prompt)
    if not len(prompt):
        raise ValueError(
            "the prompt is empty, and this tokenizer has no BOS: nothing stands before the "
            f"completion's first token. Give as {PROMPT_IDS} what the model began with"
        )
    unknown = np.full(len(prompt), np.nan, np.float32)
    return RolloutTokens(
        np.concatenate([prompt, completion]).astype(np.int32),
        np.arange(len(prompt) + len(completion)) >= len(prompt),
        np.concatenate([unknown, one.logprobs]),
    )


def _prompt(one: Rollout, encoded: Iterator[np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    if one.prompt_ids is not None:
        begins = one.prompt_ids[:1].tolist()
        rest = one.prompt_ids[1:] if begins and begins[0] in tokenizer.special_ids else None
        _require_spelt(one.prompt_ids, rest, one.prompt, tokenizer, name=PROMPT_IDS)
        return one.prompt_ids
    ids, bos = next(encoded), tokenizer.bos_id
    if bos is None or ids[:1].tolist() == [bos]:
        return ids
    return np.concatenate([np.array([bos], ids.dtype), ids])


def _completion(
    one: Rollout, encoded: Iterator[np.ndarray], tokenizer: Tokenizer, *, prompt: np.ndarray
) -> np.ndarray:
    if one.completion_ids is not None:
        last = int(one.completion_ids[-1])
        ended = last in tokenizer.special_ids or last in tokenizer.end_ids
        rest = one.completion_ids[:-1] if ended else None
        _require_spelt(
            one.completion_ids, rest, one.completion, tokenizer, name=COMPLETION_IDS, after=prompt
        )
        return one.completion_ids
    ids = next(encoded)
    if len(one.logprobs) == len(ids) + 1:
        return np.append(ids, tokenizer.eos_id)
    if len(one.logprobs) != len(ids):
        raise ValueError(
            f"{len(one.logprobs)} {LOGPROBS}, but its completion has {len(ids)} tokens "
            f"({len(ids) + 1} with EOS). If the model spelt it otherwise than the tokenizer does, "
            f"give {COMPLETION_IDS}"
        )
    return ids


def _require_spelt(
    ids: np.ndarray,
    inner: np.ndarray | None,
    text: str,
    tokenizer: Tokenizer,
    *,
    name: str,
    after: np.ndarray | None = None,
) -> None:
    """ValueError unless `ids` are those of `text`.

    `inner` are the ids without a special token at the edge, which the text may lack; `after` are
    the ids in front, with which a tokenizer may decode others differently.
    """
    if len(ids) and (largest := int(ids.max())) >= tokenizer.size:
        at = int(np.argmax(ids))
        raise ValueError(
            f"{name}[{at}] is {largest}, but the tokenizer's ids are below {tokenizer.size}"
        )
    possible = [ids] if inner is None else [ids, inner]
    # SentencePiece leaves out the space in front of what it decodes.
    if any(tokenizer.decode(one).removeprefix(" ") == text.removeprefix(" ") for one in possible):
        return
    if after is not None:  # WordPiece writes a space, or ##, by what is in front
        before = tokenizer.decode(after)
        if any(tokenizer.decode([*after, *one]) == before + text for one in possible):
            return
    # A tokenizer that changes letters does not decode to the text that it encoded.
    (again,) = tokenizer.encode_batch([text])
    if not any(np.array_equal(one, again) for one in possible):
        spelt = tokenizer.decode(ids)
        raise ValueError(
            f"{name} spell {spelt[:60]!r}, but the text is {text[:60]!r}; write both from the same "
            "tokens"
        )
