"""docs/format.md is enough to read a cache: a reader written from it gives what `read` gives."""

import numpy as np
import pytest

from decant.pipelines.config import Attention, Hidden, Sketch
from decant.pipelines.upkeep.collect import collect
from decant.pipelines.upkeep.forget import forget
from decant.schemas import open_cache
from decant.schemas.targets.targets import BETAS, EIGHTHS
from tests.making.caches import tiny_cache, write_corpus
from tests.paths import GOLDEN
from tests.schemas import page_reader

LAYERS = {
    "lossless": {
        "counts": 20,
        "sketch": Sketch(rank=5, step=0.0),
        "hidden": Hidden(layers=(1,), dtype="bfloat16"),
        "attention": Attention(layers=(0,), dtype="bfloat16"),
    },
    "fast": {"counts": 40, "sketch": Sketch(rank="full")},
    "compact": {
        "counts": 300,
        "sketch": Sketch(rank=20, step=1.0),
        "hidden": Hidden(layers=(2,), dtype="int8", width=24),
        "attention": Attention(layers=(1,), dtype="uint8-log", heads="mean"),
    },
}
CODECS = {
    "lossless": {(1, 1), (2, 3), (3, 1), (4, 1)},
    "fast": {(1, 2), (2, 2), (3, 2), (4, 2)},
    "compact": {(1, 3), (2, 2), (3, 2), (4, 2)},
}


@pytest.fixture(scope="module", params=["lossless", "fast", "compact"])
def cache(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    write_corpus(root / "corpus", files=6, words=90)
    return tiny_cache(
        root,
        profile=request.param,
        k=12,
        draws=5,
        draw_temperatures=(1.0, 2.0),
        **LAYERS[request.param],
    )


@pytest.mark.parametrize("profile", ["lossless", "compact"])
def test_it_reads_heads_of_different_sizes(profile, tmp_path):
    write_corpus(tmp_path / "corpus", files=6, words=90)
    settings = {"k": 24, "mass": 0.999, "counts": 20, "sketch": Sketch(rank=4)}
    cache = tiny_cache(tmp_path, profile=profile, **settings)
    assert (17, 2) in page_reader.count_codecs(cache.path)
    require_equal(cache)


def require_equal(cache):
    ours = cache.read(np.arange(len(cache)), list(cache.manifest.signals))
    assert {"count_ids", "sketch", "label_logprobs"} <= ours.keys()
    theirs = page_reader.read_cache(cache.path)
    assert theirs.keys() == ours.keys()
    for name, expected in ours.items():
        got = theirs[name]
        if expected.dtype.kind in "ib":
            np.testing.assert_array_equal(got, expected, err_msg=name)
        else:
            expected = expected.astype(np.float32)
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5, err_msg=name)


def test_a_reader_written_from_the_page_reads_what_open_cache_reads(cache):
    codecs = page_reader.count_codecs(cache.path)
    assert {pair for pair in codecs if pair[0] < 16} == CODECS[cache.manifest.logits.profile]
    require_equal(cache)


def test_it_blanks_forgotten_documents_as_the_page_says(cache):
    forget(cache.path, source="document-001.txt")
    require_equal(open_cache(cache.path))


def test_it_reads_what_gc_leaves_of_the_rows_that_it_overwrites(tmp_path):
    write_corpus(tmp_path / "corpus", files=6, words=20)
    settings = {"sequence_length": 256, "heldout": 0.0, "profile": "compact"}
    cache = tiny_cache(tmp_path, counts=20, sketch=Sketch(rank=5, dither=True), **settings)
    forget(cache.path, source="document-001.txt")
    collect(cache.path)
    require_equal(open_cache(cache.path))


@pytest.mark.parametrize("name", ["counts-1", "counts-1-head"])
def test_it_decodes_the_golden_records_of_counts(name):
    with np.load(GOLDEN / "fields" / f"{name}.npz") as file:
        arrays = dict(file)
    tables = {n.removeprefix("table_"): a for n, a in arrays.items() if n.startswith("table_")}
    expected = [
        dict(zip(ids[counts > 0].tolist(), counts[counts > 0].tolist(), strict=True))
        for ids, counts in zip(arrays["ids"], arrays["counts"], strict=True)
    ]
    head = arrays["head_ids"], arrays["head_logprobs"]
    draws = int(arrays["counts"][0].sum())
    got = page_reader.counts(arrays["payload"].tobytes(), len(expected), draws, *head, tables, 1000)
    assert got == expected


@pytest.mark.parametrize("name", sorted(path.stem for path in (GOLDEN / "codecs").glob("*.npz")))
def test_it_decodes_the_golden_record_of_every_codec(name):
    """These have several groups of positions, empty tails and log-probabilities of log 0."""
    with np.load(GOLDEN / "codecs" / f"{name}.npz") as file:
        arrays = dict(file)
    tables = {n.removeprefix("table_"): a for n, a in arrays.items() if n.startswith("table_")}
    blocks = {}
    for block, array in arrays.items():
        if block.startswith("block_"):
            _, field, codec = block.split("_")
            blocks[int(field)] = int(codec), array.tobytes()
    n, k = arrays["ids"].shape
    nodes = EIGHTHS if "tail-3" in name else BETAS
    got = page_reader.decode(blocks, k, n, tables, 1000, nodes)
    np.testing.assert_array_equal(got["topk_ids"], arrays["ids"])
    expected = {"topk_logprobs": "logprobs", "tail_logmass": "tail_logmass"}
    if "draws" in name:
        np.testing.assert_array_equal(got["tail_ids"], arrays["draws_ids"])
        expected["tail_logprobs"] = "draws_logprobs"
    for ours, stored in expected.items():
        np.testing.assert_allclose(got[ours], arrays[stored], rtol=1e-5, atol=1e-5)
