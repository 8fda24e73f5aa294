"""A SentencePiece BPE model as a Hugging Face tokenizer directory, for studies.

    python -m benchmarks.sentencepiece_directory MODEL OUTPUT

The registry package mistral-common ships such a model: `mistral_common/data/tokenizer.model.v1`
(32,000 tokens, bytes for what it does not know; `pip download --no-deps mistral-common`, unpack).
"""

import argparse
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decant.models.text.gguf_tokenizer import tokenizer_files
from decant.schemas.disk.atomic import write_bytes

PIECES, NORMALIZER, CHARSMAP = 1, 3, 2
"""Numbers of fields of the model's protocol buffer, and of its normalizer's."""
TEXT, SCORE, KIND = 1, 2, 3
"""Numbers of fields of a piece."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    for name, content in directory_files(options.model).items():
        write_bytes(options.output / name, content)


def directory_files(model: Path) -> dict[str, bytes]:
    """Contents by file name. ValueError for a model that changes texts."""
    pieces, normalizer = [], {}
    for number, value in _fields(model.read_bytes()):
        if number == PIECES:
            pieces.append(dict(_fields(value)))
        elif number == NORMALIZER:
            normalizer = dict(_fields(value))
    if normalizer.get(CHARSMAP):
        raise ValueError(f"{model}: its normalizer changes texts; take a model that does not")
    tokens = [piece[TEXT].decode() for piece in pieces]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": [struct.unpack("<f", piece.get(SCORE, bytes(4)))[0] for piece in pieces],
        "token_type": [piece.get(KIND, 1) for piece in pieces],
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
        "unknown_token_id": tokens.index("<unk>"),
    }
    named = {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}
    return tokenizer_files(named, where=str(model))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            value, at = _varint(data, at)
        else:
            if size is None:
                size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


if __name__ == "__main__":
    main()
