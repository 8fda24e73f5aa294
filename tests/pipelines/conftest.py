"""What several files of tests look at."""

import pytest

from tests.making.grown import Grown, make_grown


@pytest.fixture(scope="session")
def grown(tmp_path_factory) -> Grown:
    """Read only; `copied` gives one to change."""
    return make_grown(tmp_path_factory.mktemp("grown"))
