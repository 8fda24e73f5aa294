"""Records that released versions wrote still decode to the same targets."""

import numpy as np
import pytest

from decant.schemas.codecs import Block, Tables, decode
from tests.paths import GOLDEN

RECORDS = sorted((GOLDEN / "codecs").glob("*.npz"), key=lambda path: path.stem)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_of_every_codec_version_decodes_as_when_it_was_written(path):
    with np.load(path) as file:
        arrays = dict(file)
    tables, blocks = {}, []
    for name, array in arrays.items():
        kind, _, rest = name.partition("_")
        if kind == "table":
            tables[rest] = array
        if kind == "block":
            field, codec = map(int, rest.split("_"))
            blocks.append(Block(field, codec, array.tobytes()))
    n, k = arrays["ids"].shape
    targets = decode(
        [blocks], positions=[n], k=k, vocabulary=1000, tables=Tables.from_arrays(tables)
    )
    np.testing.assert_array_equal(targets.ids, arrays["ids"])
    if "draws_ids" in arrays:
        assert targets.draws
        np.testing.assert_array_equal(targets.draws.ids, arrays["draws_ids"])
        np.testing.assert_allclose(
            targets.draws.logprobs, arrays["draws_logprobs"], rtol=1e-6, atol=1e-6
        )
        assert targets.draws.betas == tuple(arrays["betas"])
    else:
        assert targets.draws is None
    # exp and log may differ in the last bit between machines.
    for name in ("logprobs", "tail_logmass"):
        np.testing.assert_allclose(getattr(targets, name), arrays[name], rtol=1e-6, atol=1e-6)


def test_there_is_a_golden_record_of_every_codec():
    assert [path.stem for path in RECORDS] == [
        "topk-1-tail-1",
        "topk-1-tail-1-draws-1",
        "topk-1-tail-3",
        "topk-2-tail-2",
        "topk-3-tail-2",
        "topk-3-tail-2-draws-2",
    ]
