"""A tiny cache of two parts: captured, then grown by more files, one of them a copy."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Attention, Hidden, Precompute
from decant.schemas import Cache, open_cache
from decant.schemas.disk.identity import file_sha256
from tests.making.caches import TEXT, tiny_settings, write_corpus

SIGNALS = {
    "profile": "compact",
    "draws": 2,
    "shard_bytes": 2048,
    "hidden": Hidden(layers=(1,), dtype="int8", width=6),
    "attention": Attention(layers=(1,)),
}
NAMES = ("logits", "hidden/1", "attention/1")
LINES = "lines.jsonl"
COPY = "again.txt"


@dataclasses.dataclass
class Grown:
    """The cache and what it was before it grew."""

    root: Path
    cache: Cache
    before: dict[str, str]
    """Hashes of its files."""
    reader: Cache
    """Opened then."""
    old: dict[str, np.ndarray]
    """What it read then."""
    more: dict[str, str]
    """Texts of the new documents by file, in order where they are several lines."""

    def copied(self, to: Path) -> Path:
        """The cache, its corpus and teacher, elsewhere."""
        for name in ("cache", "corpus", "teacher"):
            shutil.copytree(self.root / name, to / name)
        return to


def settings(root: Path, **changes: Any) -> Precompute:
    """What the cache was captured with."""
    config = tiny_settings(root, **{**SIGNALS, **changes})
    corpus = dataclasses.replace(config.corpus, files=(str(root / "corpus" / "*"),))
    return dataclasses.replace(config, corpus=corpus)


def make_grown(root: Path) -> Grown:
    """Capture, add files, capture again."""
    corpus = write_corpus(root / "corpus", files=4, words=120)
    precompute(settings(root))
    reader = open_cache(root / "cache")
    old, before = reader.read(reader.rows(), NAMES), hashes(root / "cache")
    more = write_more(corpus)
    shutil.copy(corpus / "document-001.txt", corpus / COPY)
    precompute(settings(root))
    return Grown(root, open_cache(root / "cache"), before, reader, old, more)


def write_more(corpus: Path) -> dict[str, str]:
    """More documents, in files that come before, between and behind those that are there."""
    found = {f"{'adz'[n]}-more-{n}.txt": _text(n) for n in range(3)}
    for name, text in found.items():
        (corpus / name).write_text(text)
    lines = [_text(n) for n in range(3, 7)]
    (corpus / LINES).write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    return found | {f"{LINES}:{n}": text for n, text in enumerate(lines)}


def _text(n: int) -> str:
    words = TEXT.split(" ")
    return " ".join(words[(3 * i + i * i * (n + 2)) % len(words)] for i in range(60 + 9 * n))


def hashes(directory: Path) -> dict[str, str]:
    """sha256 of each file below."""
    return {
        path.relative_to(directory).as_posix(): file_sha256(path)
        for path in directory.rglob("*")
        if path.is_file()
    }
