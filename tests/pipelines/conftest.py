"""The grown cache that several test files read."""

import pytest

from tests.making.grown import Grown, make_grown


@pytest.fixture(scope="session")
def grown(tmp_path_factory) -> Grown:
    """For reading only; `grown.copied(path)` makes a copy to change."""
    return make_grown(tmp_path_factory.mktemp("grown"))
