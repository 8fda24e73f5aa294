"""Damage to any file of a sealed cache gives an error that names the file, or does no harm."""

import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from decant.models.text.tokenizer import tokenizer_of
from decant.pipelines.capture import step_inputs
from decant.pipelines.config import Attention, Hidden, Sketch
from decant.schemas import Cache, open_cache
from decant.schemas.disk.atomic import read_json
from decant.schemas.manifest.plan import read_plan
from tests.making.arrays import flip, same_bits
from tests.making.caches import tiny_cache, write_corpus

FLIPS = 100  # bits flipped in each kind of file, one at a time

# By kind: its files (for units, those of the first) and the least number of flips that must give an
# error. Other flips hit bytes without content or bytes that `everything` does not read: most of an
# ArrayRecord file is padding, and nothing reads canary statistics.
KINDS = {
    "manifest": ("manifest.json", 100),
    "rows": ("parts/0000/rows/unit-00000*", 40),
    "logits": ("parts/0000/logits/unit-00000*", 40),
    "counts": ("parts/0000/counts/unit-00000*", 40),
    "sketch": ("parts/0000/sketch/unit-00000*", 40),
    "statistics": ("parts/0000/statistics/*", 60),
    "int8 states": ("parts/0000/hidden/1/c.0.*", 90),
    "scales of int8 states": ("parts/0000/hidden/1-scale/c.0.*", 90),
    "attention maps": ("parts/0000/attention/*/c.0.*", 90),
    "metadata of arrays": ("parts/0000/*/*/zarr.json", 100),
    "commits of arrays": ("parts/0000/commits/[ah]*-unit-00000.json", 60),
    "plan": ("parts/0000/plan.json", 100),
    "request": ("parts/0000/request.json", 100),
    "tokenizer": ("tokenizer/tokenizer*.json", 60),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    """A cache with every kind of signal; the sketch was added later."""
    root = tmp_path_factory.mktemp("damage")
    write_corpus(root / "corpus", files=4, words=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_inputs, "choose_unit_rows", lambda *_, **__: 2)
        settings = {
            "profile": "compact",
            "draws": 3,
            "counts": 20,
            "heldout": 0.0,
            "shard_bytes": 1000,
            "hidden": Hidden(layers=(1,), dtype="int8", width=6),
            "attention": Attention(layers="all"),
        }
        tiny_cache(root, **settings)
        return tiny_cache(root, **settings, sketch=Sketch(rank=6, dither=True))


@pytest.fixture(scope="module")
def whole(cache) -> dict[str, np.ndarray]:
    return everything(cache.path)


def everything(path: Path, *, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    """All rows, signals and tables of a cache, from a new reader."""
    cache = open_cache(path)
    arrays = cache.read(cache.rows()[rows], signals=tuple(cache.manifest.signals))
    directions = cache.directions("hidden/1")
    assert directions is not None
    of_parts = {"prior": cache.tail_prior(), "directions": directions}
    return arrays | of_parts | {"head": cache.sketch_head().head, "bias": cache.sketch_head().bias}


def vocabulary(path: Path) -> dict[str, np.ndarray]:
    tokenizer = tokenizer_of(open_cache(path))
    texts = [tokenizer.decode([i]) for i in range(tokenizer.size)]
    return {"texts": np.array(texts), "eos": np.array(tokenizer.eos_id)}


READERS: dict[str, Callable[[Path], object]] = {
    "plan": lambda path: read_plan(path / "parts" / "0000" / "plan.json"),
    "request": lambda path: read_json(path / "parts" / "0000" / "request.json"),
    "tokenizer": vocabulary,
}


def same(value: object, expected: object) -> bool:
    if not isinstance(value, dict) or not isinstance(expected, dict):
        return value == expected
    return value.keys() == expected.keys() and all(
        same_bits(value[name], expected[name])
        if isinstance(value[name], np.ndarray)
        else value[name] == expected[name]
        for name in value
    )


def random_byte(file: Path, chance: random.Random) -> int:
    """Offset of a random byte; in an ArrayRecord, half of the time of one that is not zero."""
    if file.suffix == ".array_record" and chance.random() < 0.5:
        used = np.flatnonzero(np.frombuffer(file.read_bytes(), np.uint8))
        return int(chance.choice(used.tolist()))
    return chance.randrange(file.stat().st_size)


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_is_silent(cache, kind):
    pattern, least = KINDS[kind]
    read = READERS.get(kind, partial(everything, rows=slice(0, 2)))
    expected = read(cache.path)
    files = sorted(cache.path.glob(pattern))
    chance, outcomes = random.Random(kind), Counter()
    for _ in range(FLIPS):
        file = chance.choice(files)
        at, bit = random_byte(file, chance), chance.randrange(8)
        flip(file, at, bit=bit)
        try:
            outcome = "harmless" if same(read(cache.path), expected) else "silent"
        except ValueError as error:
            outcome = "refused" if names(error, file, kind=kind) else f"unnamed: {error!r}"
        finally:
            flip(file, at, bit=bit)
        assert outcome in ("harmless", "refused"), f"{file}, bit {bit} of byte {at}: {outcome}"
        outcomes[outcome] += 1
    assert outcomes["refused"] >= least, outcomes


def names(error: ValueError, file: Path, *, kind: str) -> bool:
    # A tokenizer has several files and one digest, so only their directory can be named.
    return (str(file.parent) if kind == "tokenizer" else str(file)) in str(error)


def of_unit(cache: Cache) -> list[tuple[Path, Path]]:
    """One file of each kind of unit 0, each with the same file of unit 2."""
    part = cache.path / "parts" / "0000"
    names = (
        "rows/unit-0000{}.array_record",
        "logits/unit-0000{}.array_record",
        "counts/unit-0000{}.array_record",
        "sketch/unit-0000{}.array_record",
        "hidden/1/c.{}.0.0",
        "hidden/1-scale/c.{}.0",
        "attention/1/c.{}.0.0.0",
        "commits/hidden-1-unit-0000{}.json",
        "commits/attention-1-unit-0000{}.json",
    )
    pairs = [(part / name.format(0), part / name.format(2)) for name in names]
    assert all(path.exists() for pair in pairs for path in pair)
    return pairs


@pytest.mark.parametrize("number", range(9))
def test_a_truncated_missing_or_exchanged_file_of_a_unit_is_named(cache, whole, number):
    file, other = of_unit(cache)[number]
    mine, others = file.read_bytes(), other.read_bytes()
    assert mine != others
    for cut in (0, 1, len(mine) // 2, len(mine) - 1):
        file.write_bytes(mine[:cut])
        refused(cache, file)
    file.unlink()
    refused(cache, file)
    file.write_bytes(others)
    refused(cache, file, other)
    other.write_bytes(mine)
    refused(cache, file, other)
    file.write_bytes(mine)
    refused(cache, other)
    other.write_bytes(others)
    assert same(everything(cache.path), whole)


def refused(cache: Cache, *files: Path) -> None:
    """Assert that reading names one of `files`.

    If two files of rows are exchanged, the logits beside them are named, which no longer match.
    """
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the name is looked for below
        everything(cache.path)
    assert any(file.name in str(caught.value) for file in files), str(caught.value)


NAMED_TABLES = [
    "tail-prior-sums.npy",
    "logits-order.npy",
    "counts-table-contexts.npy",
    "sketch-head.npy",
    "sketch-deviations.npy",
]


@pytest.mark.parametrize("name", NAMED_TABLES)
def test_a_missing_or_exchanged_table_is_named(cache, whole, name):
    file = cache.path / "parts" / "0000" / "statistics" / name
    other, mine = file.with_name("tail-prior-counts.npy"), file.read_bytes()
    for content in (mine[:-1], b"", other.read_bytes(), None):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        refused(cache, file)
        file.write_bytes(mine)
    assert same(everything(cache.path), whole)
