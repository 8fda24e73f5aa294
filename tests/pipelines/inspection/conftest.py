"""The cache that the tests of inspection read."""

import numpy as np
import pytest

from decant.pipelines.config import Attention, Hidden
from tests.making.caches import tiny_cache


@pytest.fixture(scope="package")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspected")
    hidden, attention = Hidden(layers=(1,)), Attention(layers=(0,))
    return tiny_cache(root, hidden=hidden, attention=attention, draws=4)


@pytest.fixture(scope="package")
def student(cache):
    """A student that gives every stored id half of what the teacher gives it, and id 7 a third."""

    def predict(rows):
        batch = cache.read(rows)
        shape = batch["tokens"].shape
        return {
            "label_logprobs": np.full(shape, np.log(0.125)),
            "topk_logprobs": batch["topk_logprobs"] + np.log(0.5),
            "top_ids": np.full((*shape, 1), 7),
            "top_logprobs": np.full((*shape, 1), np.log(1 / 3)),
            "kl_bound": np.full(shape, 0.75),
        }

    return predict
