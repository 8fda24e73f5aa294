"""The cache that the tests of inspection read."""

import pytest

from decant.pipelines.config import Attention, Hidden
from tests.making.caches import tiny_cache


@pytest.fixture(scope="package")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspected")
    return tiny_cache(root, hidden=Hidden(layers=(1,)), attention=Attention(layers=(0,)))
