"""One tiny capture with every kind of signal, for the tests of loops of one's own."""

import pytest

from decant.pipelines.config import Attention, Hidden
from decant.schemas import Cache
from tests.making.caches import tiny_cache


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Cache:
    """Six draws a position for T up to 2, hidden states in int8, maps of one byte a probability."""
    return tiny_cache(
        tmp_path_factory.mktemp("own-loop"),
        draws=6,
        draw_temperatures=(1.0, 2.0),
        hidden=Hidden(layers=(1,), dtype="int8"),
        attention=Attention(layers=(0,)),
    )
