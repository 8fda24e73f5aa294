"""Text to token ids and back, by the files of a Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tokenizers

from decant.models.text.chat_template import ChatTemplate
from decant.models.text.named_templates import (
    CHAT_TEMPLATE,
    DEFAULT,
    TOOL_USE,
    named_templates,
    template_files,
)
from decant.schemas import Cache

DEFINITION = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
# The files of a complete tokenizer, beside more templates in a directory of their own; the ids of
# a text depend on the first two only.
FILES = (DEFINITION, SETTINGS, SPECIAL_TOKENS, CHAT_TEMPLATE)


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
        try:
            self._definition: dict[str, Any] = json.loads(files[DEFINITION])
            self._settings: dict[str, Any] = json.loads(files.get(SETTINGS, b"{}"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: a tokenizer file is not valid JSON: {error}") from error
        try:
            self._backend = tokenizers.Tokenizer.from_str(files[DEFINITION].decode())
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{where}: {DEFINITION} cannot be used: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()

    @classmethod
    def from_files(cls, directory: Path | str) -> Tokenizer:
        """The tokenizer of a directory: a model's, or a cache's `tokenizer/`."""
        directory = Path(directory)
        names = [*FILES, *template_files(directory)]
        paths = {name: directory / name for name in names if (directory / name).is_file()}
        return cls({name: path.read_bytes() for name, path in paths.items()}, where=str(directory))

    def files(self) -> dict[str, bytes]:
        """Contents by file name; `from_files` on a directory of these files gives an equal one."""
        return dict(self._files)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32, without special tokens around them."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ids of each text, as `encode_batch` gives them, and the span of each token.

        Spans are int32 [n, 2]: the characters [start, end) that the token is made from. Tokens
        that are parts of one character have that character's span.
        """
        encodings = self._span_backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.asarray(e.ids, np.int32), np.asarray(e.offsets, np.int32).reshape(-1, 2))
            for e in encodings
        ]

    @cached_property
    def _span_backend(self) -> tokenizers.Tokenizer:
        # Without the post-processor: byte-level ones trim spaces off spans, so a token of spaces
        # would have an empty span.
        definition = self._definition | {
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
        return tokenizers.Tokenizer.from_str(json.dumps(definition))

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of the ids, special tokens included."""
        return self._backend.decode([operator.index(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    @cached_property
    def eos_id(self) -> int:
        """Id of the token that ends a document. ValueError if the files name none."""
        eos_id = self._special_id("eos_token")
        if eos_id is None:
            raise ValueError(
                f"{self._where}: {SETTINGS} names no eos_token, so documents cannot be ended. Add "
                "the model's end token there."
            )
        return eos_id

    @cached_property
    def bos_id(self) -> int | None:
        """Id of the token that the tokenizer puts in front of every text; None if it puts none."""
        adds = self._settings.get("add_bos_token")
        if adds is None:
            plain = self._backend.encode("a", add_special_tokens=False).ids
            full = self._backend.encode("a", add_special_tokens=True).ids
            return full[0] if full[:1] != plain[:1] else None
        return self._special_id("bos_token") if adds else None

    @cached_property
    def digest(self) -> str:
        """Sha-256 of everything that decides ids: the definition, BOS and EOS.

        It hashes canonical JSON, so the formatting of the files does not matter.
        """
        outside = ("truncation", "padding", "version")
        rules = {k: v for k, v in self._definition.items() if k not in outside}
        facts = {"definition": rules, "bos": self.bos_id, "eos": self.eos_id}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def chat_template(self, *, date: str | None = None) -> ChatTemplate | None:
        """The template that renders chats, or None. `date`: the day that its clock shows.

        A template called "tool_use" renders the chats that have tools.
        """
        sources = named_templates(self._settings, self._files, where=self._where)
        if DEFAULT not in sources:
            return None
        kinds = {"tokens": self._token_texts, "date": date, "where": self._where}
        with_tools = ChatTemplate(sources[TOOL_USE], **kinds) if TOOL_USE in sources else None
        return ChatTemplate(sources[DEFAULT], **kinds, with_tools=with_tools)

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Texts that become special tokens wherever they occur in a text."""
        added = self._definition.get("added_tokens", [])
        return tuple(token["content"] for token in added if token["special"])

    @cached_property
    def _token_texts(self) -> dict[str, str]:
        """Name ("bos_token") → text of each special token that the files name."""
        settings = json.loads(self._files.get(SPECIAL_TOKENS, b"{}")) | self._settings
        texts = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in settings.items()
            if name.endswith("_token") and not name.startswith("add_")
        }
        return {name: text for name, text in texts.items() if isinstance(text, str)}

    def _special_id(self, name: str) -> int | None:
        """Id of the token that the settings call `name`; None if they have no such token."""
        token = self._settings.get(name)
        text = token["content"] if isinstance(token, dict) else token
        if text is None:
            return None
        token_id = self._backend.token_to_id(text)
        if token_id is None:
            raise ValueError(
                f"{self._where}: {name} is {text!r}, which {DEFINITION} does not have as a token."
            )
        return token_id


def tokenizer_of(cache: Cache) -> Tokenizer:
    """The tokenizer in a cache. ValueError if the cache was captured with another one."""
    path = cache.tokenizer_path
    try:
        digest = Tokenizer.from_files(path).digest
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: the tokenizer of this cache is damaged: {error}") from error
    if digest != cache.manifest.tokenizer:
        raise ValueError(
            f"{path}: tokenizer {digest[:12]}, but {cache.path} was captured with "
            f"{cache.manifest.tokenizer[:12]}; its files were damaged or replaced. Copy the "
            "teacher's tokenizer files there"
        )
    return Tokenizer.from_files(path)
