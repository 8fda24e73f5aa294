"""The staged top-k compared with sorting."""

import jax.numpy as jnp
import numpy as np
import pytest

from decant.models.mesh.top_k import exact_top_k


@pytest.mark.parametrize("k", [1, 5, 65, 300, 1024, 1025])
@pytest.mark.parametrize("width", [1, 31, 33, 2049, 5000, 50_021])
@pytest.mark.parametrize("distinct", [2, 50, None])
def test_the_largest_come_first_and_equals_by_the_lower_id(width, k, distinct):
    k = min(k, width)
    rng = np.random.default_rng(width + k)
    values = rng.normal(size=(3, width)).astype(np.float32)
    if distinct:
        values = rng.integers(0, distinct, values.shape).astype(np.float32)
    largest, columns = exact_top_k(jnp.asarray(values), k)
    order = np.argsort(-values, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(columns, order)
    np.testing.assert_array_equal(largest, np.take_along_axis(values, order, -1))


def test_ids_that_cannot_occur_come_last():
    values = np.full((2, 9000), -np.inf, np.float32)
    values[0, [7, 8000]] = 1, 2
    largest, columns = exact_top_k(jnp.asarray(values), 4)
    np.testing.assert_array_equal(columns, [[8000, 7, 0, 1], [0, 1, 2, 3]])
    np.testing.assert_array_equal(largest[0, 2:], [-np.inf, -np.inf])
