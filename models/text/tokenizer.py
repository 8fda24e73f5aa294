"""Text to token ids and back, by the files of a Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from decant.models.text.backend import Backend
from decant.models.text.chat_template import ChatTemplate, chat_variables
from decant.models.text.composed_spans import composing_form, with_composed
from decant.models.text.long_texts import LongTexts
from decant.models.text.named_templates import (
    CHAT_TEMPLATE,
    DEFAULT,
    TOOL_USE,
    is_template_file,
    named_templates,
    template_files,
)
from decant.models.text.token_rules import Rules, difference, token_rules
from decant.schemas import Cache

DEFINITION = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
GENERATION = "generation_config.json"
# The files of a complete tokenizer, beside more templates in a directory of their own; the ids of
# a text depend on the first three only.
FILES = (DEFINITION, SETTINGS, SPECIAL_TOKENS, CHAT_TEMPLATE, GENERATION)


class Tokenizer:
    """A tokenizer that never truncates, pads or adds special tokens by itself.

    FileNotFoundError without tokenizer.json; ValueError for files that cannot be used.

    Args:
        files: contents by file name, see `FILES`.
        where: the files' origin, for error messages.
    """

    def __init__(self, files: Mapping[str, bytes], *, where: str):
        if DEFINITION not in files:
            raise FileNotFoundError(f"{where}: no {DEFINITION} here, so text cannot be tokenised.")
        self._files = dict(files)
        self._where = where
        self._definition, self._settings, self._special = (
            self._parsed(name) for name in (DEFINITION, SETTINGS, SPECIAL_TOKENS)
        )
        content = self._files[DEFINITION].decode()
        self._backend = Backend(self._definition, content, where=f"{where}: {DEFINITION}")

    @classmethod
    def from_files(cls, directory: Path | str) -> Tokenizer:
        """The tokenizer of a directory: a model's, or a cache's `tokenizer/`."""
        return cls(read_files(Path(directory)), where=str(directory))

    def files(self) -> dict[str, bytes]:
        """Contents by file name; `from_files` on a directory of these files gives an equal one."""
        return dict(self._files)

    @property
    def where(self) -> str:
        """The files' origin, for error messages."""
        return self._where

    @property
    def backend(self) -> Backend:
        """The library's tokenizer, for the other modules of this room."""
        return self._backend

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32, without special tokens around them.

        ValueError for a text that the tokenizer cannot spell.
        """
        return self._backend.encode(texts)

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ids of each text, as `encode_batch` gives them, and the span of each token.

        Spans are int32 [n, 2]: the characters [start, end) that the token is made from. Tokens
        that are parts of one character have that character's span; if the tokenizer composes
        characters, tokens of the composed one have the span of all.
        """
        form = composing_form(self._backend)
        encoded = self._backend.encode_with_spans(texts)
        return [
            (ids, with_composed(text, spans, form=form))
            for text, (ids, spans) in zip(texts, encoded, strict=True)
        ]

    def encode_long(self, chunks: Iterable[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The ids and spans of one long text that `chunks` make up, a piece at a time.

        They are those that `encode_with_spans` gives; spans are int64.
        """
        return self._long_texts.encode(chunks)

    @cached_property
    def _long_texts(self) -> LongTexts:
        return LongTexts(self._backend)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of the ids, special tokens included."""
        return self._backend.decode([operator.index(i) for i in ids])

    @cached_property
    def size(self) -> int:
        """One more than the largest id. A model may have no embedding for the last ids."""
        return 1 + max(self._backend.ids.values())

    @cached_property
    def eos_id(self) -> int:
        """Id of the token that ends a document. ValueError if the files name none."""
        eos_id = self._special_id("eos_token", self._special | self._settings)
        if eos_id is None:
            raise ValueError(
                f"{self._where}: neither {SETTINGS} nor {SPECIAL_TOKENS} names an eos_token, so "
                "documents cannot be ended. Add the model's end token there."
            )
        return eos_id

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a generated text: EOS, then the others that generation_config.json names.

        Chat models often end a turn with another token than a document.
        """
        named = self._parsed(GENERATION).get("eos_token_id")
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(
                f"{self._where}: {GENERATION}: eos_token_id is {named!r}; expected an id or a list "
                "of ids"
            )
        return tuple(dict.fromkeys([self.eos_id, *ids]))

    @cached_property
    def bos_id(self) -> int | None:
        """Id of the token that the tokenizer puts in front of every text; None if it puts none."""
        return self._bos_id(self._special | self._settings)

    def _bos_id(self, settings: Mapping[str, Any]) -> int | None:
        adds = self._settings.get("add_bos_token")
        if adds is None:
            return self._backend.first_id()
        return self._special_id("bos_token", settings) if adds else None

    @cached_property
    def _rules(self) -> Rules:
        return token_rules(self._definition, self._backend)

    def difference(self, other: Tokenizer) -> str | None:
        """The first rule by which the ids of a text may differ; None if they cannot.

        BOS, EOS and the chat template are no part of a text.
        """
        names = (self._where, other._where)
        return difference(self._rules, other._rules, names=names)

    @cached_property
    def digest(self) -> str:
        """Sha-256 of everything that decides the ids of documents: the rules, BOS and EOS.

        The spelling of the files does not matter.
        """
        facts = {"rules": self._rules, "bos": self.bos_id, "eos": self.eos_id}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def digest_before_0_8(self) -> str:
        """The digest that releases before 0.8 recorded, over the definition as it is spelt."""
        outside = ("truncation", "padding", "version")
        rules = {k: v for k, v in self._definition.items() if k not in outside}
        # They took BOS from the settings alone.
        facts = {"definition": rules, "bos": self._bos_id(self._settings), "eos": self.eos_id}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def known_as(self, digest: str) -> bool:
        """Whether this or an older release recorded this tokenizer as `digest`."""
        return digest in (self.digest, self.digest_before_0_8)

    def with_chat_template(self, source: str) -> Tokenizer:
        """This tokenizer with a template that takes the place of all of its own."""
        files = {n: c for n, c in self._files.items() if not is_template_file(n)}
        settings = {n: v for n, v in self._settings.items() if n != "chat_template"}
        if settings != self._settings:
            files[SETTINGS] = json.dumps(settings, indent=2, ensure_ascii=False).encode()
        return Tokenizer({**files, CHAT_TEMPLATE: source.encode()}, where=self._where)

    def chat_template(
        self, *, date: str | None = None, variables: Sequence[str] = ()
    ) -> ChatTemplate | None:
        """The template that renders chats, or None. One called "tool_use" renders those with tools.

        `date` is the day that its clock shows; `variables`, each name=value, are what it may read
        besides.
        """
        sources = named_templates(self._settings, self._files, where=self._where)
        if DEFAULT not in sources:
            return None
        kinds = {
            "tokens": self._token_texts,
            "date": date,
            "where": self._where,
            "variables": chat_variables(variables),
        }
        with_tools = ChatTemplate(sources[TOOL_USE], **kinds) if TOOL_USE in sources else None
        return ChatTemplate(sources[DEFAULT], **kinds, with_tools=with_tools)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens, EOS and BOS among them: no part of what a text says."""
        added = self._backend.added_tokens().items()
        named = {self.eos_id, *([] if self.bos_id is None else [self.bos_id])}
        return frozenset({i for i, token in added if token.special} | named)

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Texts that become special tokens wherever they occur in a text."""
        added = self._backend.added_tokens().values()
        return tuple(token.content for token in added if token.special)

    @cached_property
    def _token_texts(self) -> dict[str, str]:
        """Name ("bos_token") → text of each special token that the files name."""
        texts = {
            name: value.get("content") if isinstance(value, dict) else value
            for name, value in (self._special | self._settings).items()
            if name.endswith("_token") and not name.startswith("add_")
        }
        return {name: text for name, text in texts.items() if isinstance(text, str)}

    def _special_id(self, name: str, settings: Mapping[str, Any]) -> int | None:
        """Id of the token that `settings` call `name`; None if they have no such token."""
        token = settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if text is None:
            return None
        if not isinstance(text, str):
            raise ValueError(
                f"{self._where}: {name} is {str(text)[:80]}; expected one token, as a text. If a "
                f"generated text may end with several, list their ids in {GENERATION}"
            )
        token_id = self._backend.ids.get(text)
        if token_id is None:
            raise ValueError(
                f"{self._where}: {name} is {text!r}, which {DEFINITION} does not have as a token."
            )
        return token_id

    def _parsed(self, name: str) -> dict[str, Any]:
        """The object in a JSON file; empty if there is no such file."""
        try:
            value = json.loads(self._files.get(name, b"{}"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self._where}: {name} is not valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{self._where}: {name} holds {str(value)[:40]}; expected an object")
        return value


def read_files(directory: Path) -> dict[str, bytes]:
    """Contents of the tokenizer's files in a directory, by file name."""
    names = [*FILES, *template_files(directory)]
    paths = {name: directory / name for name in names if (directory / name).is_file()}
    return {name: path.read_bytes() for name, path in paths.items()}


def tokenizer_of(cache: Cache) -> Tokenizer:
    """The tokenizer in a cache. ValueError if the cache was captured with another one."""
    path = cache.tokenizer_path
    try:
        files = {
            name: content
            for name, content in cache.tokenizer_files().items()
            if name in FILES or is_template_file(name)
        }
        tokenizer = Tokenizer(files, where=str(path))
        known = tokenizer.known_as(cache.manifest.tokenizer)
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: the tokenizer of this cache is damaged: {error}") from error
    if not known:
        raise ValueError(
            f"{path}: tokenizer {tokenizer.digest[:12]}, but {cache.path} was captured with "
            f"{cache.manifest.tokenizer[:12]}; its files were damaged or replaced. Copy the "
            "teacher's tokenizer files there"
        )
    return tokenizer
