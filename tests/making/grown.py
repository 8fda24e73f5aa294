"""Makes a tiny cache of two parts: one capture, then a second one of added files."""

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
    """The cache with both parts, and its state when it had only the first."""

    root: Path
    cache: Cache
    before: dict[str, str]
    """sha256 of each file before the second capture, by path."""
    reader: Cache
    """The cache as it was opened before the second capture."""
    old: dict[str, np.ndarray]
    """All arrays that `reader` read then."""
    more: dict[str, str]
    """Texts of the added documents, by file, or by `file:line` for JSON lines."""

    def copied(self, to: Path) -> Path:
        """Copy the cache, its corpus and its teacher to the directory `to`."""
        for name in ("cache", "corpus", "teacher"):
            shutil.copytree(self.root / name, to / name)
        return to


def settings(root: Path, **changes: Any) -> Precompute:
    """The settings of the capture, with the corpus and teacher below `root`."""
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
    """Add files that sort before, between and behind the old ones; returns their texts."""
    texts = {f"{'adz'[n]}-more-{n}.txt": _text(n) for n in range(3)}
    for name, text in texts.items():
        (corpus / name).write_text(text)
    lines = [_text(n) for n in range(3, 7)]
    (corpus / LINES).write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    return texts | {f"{LINES}:{n}": text for n, text in enumerate(lines)}


def _text(n: int) -> str:
    words = TEXT.split(" ")
    return " ".join(words[(3 * i + i * i * (n + 2)) % len(words)] for i in range(60 + 9 * n))


def hashes(directory: Path) -> dict[str, str]:
    """sha256 of each file below the directory, by relative path."""
    return {
        path.relative_to(directory).as_posix(): file_sha256(path)
        for path in directory.rglob("*")
        if path.is_file()
    }
