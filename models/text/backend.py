"""The only calls into the `tokenizers` library; whatever goes wrong there is a ValueError here.

The library is written in Rust. A panic reaches Python as a BaseException, which `except Exception`
misses, and some files would abort the process; those are refused before the library sees them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers

_MOST_IDS = 1 << 24
"""Ids must be below this. Vocabularies in use have at most 300,000."""


class Backend:
    """A `tokenizers.Tokenizer` that never truncates, pads, drops merges or adds special tokens.

    ValueError for a definition that the library cannot use.

    Args:
        definition: the parsed tokenizer.json.
        content: the same as text.
        where: the file, for error messages.
    """

    def __init__(self, definition: dict[str, Any], content: str, *, where: str):
        self._where = where
        self._definition = definition
        _refuse_aborting(definition, where=where)
        self._tokenizer = self._call(tokenizers.Tokenizer.from_str, content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if isinstance(self._tokenizer.model, tokenizers.models.BPE):
            self._tokenizer.model.dropout = None  # it would make ids random
        # Only `first_id` wants it. Byte-level ones trim spaces off spans, so a token of spaces
        # would have an empty span.
        self._post_processor = self._tokenizer.post_processor
        self._tokenizer.post_processor = None
        self.ids: dict[str, int] = self._call(self._tokenizer.get_vocab, with_added_tokens=True)
        """Token → id, added tokens included."""
        if max(self.ids.values(), default=-1) not in range(_MOST_IDS):
            raise ValueError(
                f"{where}: its largest id is {max(self.ids.values(), default=None)}; expected at "
                f"least one token, and ids below {_MOST_IDS:,}"
            )

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32."""
        encode = self._tokenizer.encode_batch_fast
        encodings = self._call(encode, list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ids of each text, and int32 [n, 2]: the span of characters of each token."""
        encode = self._tokenizer.encode_batch
        encodings = self._call(encode, list(texts), add_special_tokens=False)
        return [
            (np.asarray(e.ids, np.int32), np.asarray(e.offsets, np.int32).reshape(-1, 2))
            for e in encodings
        ]

    def encoding(self, text: str) -> tokenizers.Encoding:
        """The library's own account of a text: its tokens, and the words that it was split into."""
        return self._call(self._tokenizer.encode, text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included."""
        return self._call(self._tokenizer.decode, ids, skip_special_tokens=False)

    def first_id(self) -> int | None:
        """Id of the special token that the post-processor puts in front of texts, or None."""
        if self._post_processor is None:
            return None
        plain = self._call(self._tokenizer.encode, "a", add_special_tokens=False)
        full = self._call(self._post_processor.process, plain, add_special_tokens=True)
        return full.ids[0] if full.ids[:1] != plain.ids[:1] else None

    def added_tokens(self) -> dict[int, tokenizers.AddedToken]:
        """The tokens that are matched in a text before it is split, by id."""
        return self._call(self._tokenizer.get_added_tokens_decoder)

    def model_name(self) -> str:
        """Kind of the model: "BPE", "Unigram", "WordPiece" or "WordLevel"."""
        return type(self._tokenizer.model).__name__

    def merges_characters(self) -> bool:
        """Whether the model only joins neighbouring tokens, from single characters on, and every
        character is a token or bytes."""
        model = self._tokenizer.model
        if not isinstance(model, tokenizers.models.BPE):
            return False
        if model.continuing_subword_prefix or model.end_of_word_suffix:
            return False
        return model.byte_fallback or not model.unk_token

    def steps(self) -> dict[str, Any]:
        """The settings under "normalizer" and "pre_tokenizer", with all defaults filled in."""
        empty = tokenizers.Tokenizer(tokenizers.models.BPE())
        for name in ("normalizer", "pre_tokenizer"):
            if (step := getattr(self._tokenizer, name)) is not None:
                setattr(empty, name, step)
        filled = json.loads(self._call(empty.to_str))
        return {name: filled[name] for name in ("normalizer", "pre_tokenizer")}

    def model(self) -> dict[str, Any]:
        """The model's settings as the file has them, without vocabulary and merges."""
        written = self._definition["model"]
        return {k: v for k, v in written.items() if k not in ("vocab", "merges")} | {
            "type": self.model_name()
        }

    def normalised(self, step: dict[str, Any], text: str) -> str:
        """The text after one step of the normalizer, as `steps` gives it."""
        empty = tokenizers.Tokenizer(tokenizers.models.BPE())
        definition = {**json.loads(self._call(empty.to_str)), "normalizer": step}
        made = self._call(tokenizers.Tokenizer.from_str, json.dumps(definition))
        return self._call(made.normalizer.normalize_str, text)

    def kept(self, text: str) -> list[tuple[int, int]]:
        """Spans of characters that the pre-tokenizer leaves."""
        if (pre_tokenizer := self._tokenizer.pre_tokenizer) is None:
            return [(0, len(text))]
        return [span for _, span in self._call(pre_tokenizer.pre_tokenize_str, text)]

    def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{self._where} cannot be used: {error}") from error
        except BaseException as error:
            # The class of panics cannot be imported.
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{self._where} cannot be used: {error}") from error


def _refuse_aborting(definition: dict[str, Any], *, where: str) -> None:
    """ValueError for definitions with which the library ends the whole process."""
    model = definition.get("model")
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    merges = model.get("merges") if prefix and isinstance(model, dict) else None
    for merge in merges if isinstance(merges, list) else ():
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or not str(pair[-1]).startswith(str(prefix)):
            raise ValueError(
                f"{where} cannot be used: the second part of merge {str(merge)[:60]!r} does not "
                f"begin with the continuing_subword_prefix {str(prefix)[:60]!r}"
            )
    for charsmap in _charsmaps(definition.get("normalizer")):
        try:
            data = base64.b64decode(charsmap, validate=True)
        except ValueError as error:
            raise ValueError(f"{where} cannot be used: precompiled_charsmap: {error}") from error
        # The first number is the size of the table that follows, in bytes.
        size = int.from_bytes(data[:4], "little")
        if size % 4 or not 4 <= size <= len(data) - 4:
            raise ValueError(
                f"{where} cannot be used: precompiled_charsmap has {len(data)} bytes and says that "
                f"its table has {size}"
            )


def _charsmaps(normalizer: Any) -> Iterator[str]:
    """The tables of all `Precompiled` steps, at any depth."""
    if not isinstance(normalizer, dict):
        return
    if isinstance(charsmap := normalizer.get("precompiled_charsmap"), str):
        yield charsmap
    nested = normalizer.get("normalizers")
    for inner in nested if isinstance(nested, list) else ():
        yield from _charsmaps(inner)
