"""The bytes that each token of a tokenizer stands for.

Joined, the bytes of a text's ids are the text in UTF-8. Some tokenizers put a space in front of a
text (`Spelling.prefix`), and those that split by words drop spaces (`Spelling.drops_spaces`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from decant.models.text.backend import Backend
from decant.models.text.tokenizer import Tokenizer

Bytes = bytes
Prefix = Literal["never", "first", "always"]
_PROBE = "  A b\n\n  C\tdé ü 中文 🙂 0! ~x \n"
"""Plain text that a tokenizer must not change, but for the sign that it writes for a space."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Spelling:
    """How a tokenizer's ids spell. `V` is `Tokenizer.size`."""

    bytes: tuple[Bytes | None, ...]
    """By id: the bytes. None: a special token, the unknown token, or an id without a token."""
    special: Mapping[int, str]
    """Id → text of each special token."""
    prefix: Prefix
    """Where the tokenizer puts a space in front of a stretch of text: never, at the beginning of a
    document only, or also after each special token."""
    doubles_space: bool
    """Whether it puts one also in front of text that begins with a space."""
    drops_spaces: bool
    """Whether spaces and line breaks between words are in no token."""
    continuing: frozenset[int]
    """Ids that stand inside words only, such as "##ing"; of tokenizers that drop spaces."""
    unknown: int | None
    """Id of the token for what the tokenizer cannot spell; None if it has none."""
    bos: int | None
    """Id of the token that the tokenizer puts in front of every document; None if it puts none."""

    def puts_space(self, *, opens: bool, after_special: bool) -> bool:
        """Whether the tokenizer puts a space in front of a stretch of text.

        Args:
            opens: nothing but BOS is in front of it in its document.
            after_special: it follows a special token.
        """
        return (self.prefix == "always" and (opens or after_special)) or (
            self.prefix == "first" and opens
        )

    def without_prefix(self, text: Bytes) -> Bytes:
        """A stretch's text from the bytes of its tokens, where `puts_space` holds."""
        rest = text.removeprefix(b" ")
        if self.doubles_space:
            return rest
        # Text of its own space has none put in front. "a" and " a" have the same tokens.
        return text if rest.startswith(b" ") or not rest else rest

    @cached_property
    def written(self) -> tuple[Bytes, ...]:
        """By id: the bytes in a text, of special tokens those of their own text."""
        texts = self.special
        return tuple(
            texts[i].encode() if i in texts else spelt or b"" for i, spelt in enumerate(self.bytes)
        )

    @cached_property
    def count(self) -> int:
        """Number of tokens."""
        return sum(spelt is not None or i in self.special for i, spelt in enumerate(self.bytes))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Bytes of each token as `written`, int64 [V]."""
        return np.fromiter(map(len, self.written), np.int64, len(self.written))

    @cached_property
    def is_special(self) -> np.ndarray:
        """Whether each id has no bytes of its own, bool [V]."""
        return np.array([spelt is None for spelt in self.bytes], bool)

    def join(self, ids: Iterable[int]) -> Bytes:
        """The bytes that the ids spell, special tokens by their own text."""
        written = self.written
        return b"".join([written[i] for i in ids])


def token_spelling(tokenizer: Tokenizer) -> Spelling:
    """The bytes of each of the tokenizer's ids.

    ValueError if the tokenizer changes plain text, so that its tokens cannot be found in the text
    byte by byte; it names the step that changes it.
    """
    backend = tokenizer.backend
    drops_spaces = _drops_spaces(backend, where=tokenizer.where)
    _refuse_changing(backend, but_spaces=drops_spaces, where=tokenizer.where)
    spell = _speller(backend)
    added = backend.added_tokens()
    special = {i: token.content for i, token in added.items() if token.special}
    unknown = _unknown(backend)
    spelt: list[bytes | None] = [None] * tokenizer.size
    for token, i in backend.ids.items():
        if i not in special and i != unknown:
            # Added tokens are found in the text as they are written.
            spelt[i] = (added[i].content.encode() if i in added else spell(token)) or None
    begin = _continuing_prefix(backend)
    made = Spelling(
        bytes=tuple(spelt),
        special=special,
        prefix="never",
        doubles_space=False,
        drops_spaces=drops_spaces,
        continuing=frozenset(
            i for token, i in backend.ids.items() if begin and token.startswith(begin)
        ),
        unknown=unknown,
        bos=tokenizer.bos_id,
    )
    spaced = made.join(tokenizer.encode_batch([" x"])[0].tolist())
    return replace(made, prefix=_prefix(tokenizer, made), doubles_space=spaced == b"  x")


def _speller(backend: Backend) -> Callable[[str], bytes | None]:
    """The function from a token of the model to its bytes; None for one that no text gives."""
    steps = [*_flat(backend.steps()["normalizer"]), *_flat(backend.steps()["pre_tokenizer"])]
    model = backend.model()
    if any(step["type"] == "ByteLevel" for step in steps):
        return _byte_level()
    spaces = [sign for step in steps if (sign := _space_sign(step))]
    begin = _continuing_prefix(backend)
    end, fallback = model.get("end_of_word_suffix"), model.get("byte_fallback")

    def spell(token: str) -> bytes | None:
        if fallback and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if begin and token.startswith(begin):
            token = token[len(begin) :]
        if end and token.endswith(end):
            token = token[: -len(end)]
        for sign in spaces:
            token = token.replace(sign, " ")
        return token.encode()

    return spell


def _byte_level() -> Callable[[str], bytes | None]:
    """Byte-level tokenizers write each byte as a character. Printable Latin-1 stands for itself,
    and the other bytes have the characters from U+0100 on, in order."""
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in itself]
    # Characters that stand for no byte become one that Latin-1 does not have.
    table = dict.fromkeys(others, 0xFFFD) | {256 + n: byte for n, byte in enumerate(others)}

    def spell(token: str) -> bytes | None:
        try:
            return token.translate(table).encode("latin-1")
        except UnicodeEncodeError:
            return None

    return spell


def _space_sign(step: Mapping[str, Any]) -> str | None:
    """The character that a step writes for a space, or None."""
    if step["type"] == "Metaspace":
        return step["replacement"]
    if step["type"] == "Replace" and step["pattern"] == {"String": " "}:
        return step["content"]
    return None


def _continuing_prefix(backend: Backend) -> str:
    """The sign in front of tokens that continue a word."""
    model = backend.model()
    return model.get("continuing_subword_prefix") or ("##" if model["type"] == "WordPiece" else "")


def _unknown(backend: Backend) -> int | None:
    model = backend.model()
    if model["type"] == "Unigram":
        return model.get("unk_id")
    return backend.ids.get(model.get("unk_token") or "")


def _flat(step: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps in order, without sequences."""
    if step is None:
        return
    inner = step.get("normalizers", step.get("pretokenizers"))
    if inner is None:
        yield dict(step)
    for each in inner or ():
        yield from _flat(each)


def _refuse_changing(backend: Backend, *, but_spaces: bool, where: str) -> None:
    """ValueError if a step of the normalizer changes text; with `but_spaces`, more than spaces."""
    for step in _flat(backend.steps()["normalizer"]):
        if step["type"] == "ByteLevel":
            continue
        made, plain = backend.normalised(step, _PROBE), _PROBE
        if sign := _space_sign(step):
            made = made.replace(sign, " ")
        if step["type"] == "Prepend":
            plain = step["prepend"] + _PROBE
        if but_spaces:
            made, plain = ("".join(text.split()) for text in (made, plain))
        if made != plain:
            at = next((i for i, (a, b) in enumerate(zip(made, plain, strict=False)) if a != b), 0)
            raise ValueError(
                f"{where}: its normalizer {step['type']} changes plain text (it writes "
                f"{made[at : at + 8]!r} for {plain[at : at + 8]!r}), so its tokens cannot be "
                "aligned with another tokenizer's byte by byte. Use a tokenizer that keeps texts"
            )


def _drops_spaces(backend: Backend, *, where: str) -> bool:
    """Whether the pre-tokenizer drops spaces. ValueError if it drops other characters."""
    kept = np.zeros(len(_PROBE) + 1, np.int64)
    for start, end in backend.kept(_PROBE):
        kept[start] += 1
        kept[end] -= 1
    lost = [c for c, n in zip(_PROBE, np.cumsum(kept), strict=False) if not n]
    if other := [c for c in lost if not c.isspace()]:
        raise ValueError(
            f"{where}: its pre-tokenizer drops characters such as {other[0]!r}, so its tokens "
            "cannot be aligned with another tokenizer's byte by byte. Use a tokenizer that keeps "
            "texts"
        )
    return bool(lost)


def _prefix(tokenizer: Tokenizer, spelling: Spelling) -> Prefix:
    """Where the tokenizer puts a space in front of a stretch of text, found by trying."""
    special = next(iter(spelling.special.values()), "")
    alone, after = (ids.tolist() for ids in tokenizer.encode_batch(["x", f"{special}x"]))
    if spelling.join(alone) != b" x":
        return "never"
    return "always" if spelling.join(after) == f"{special} x".encode() else "first"
