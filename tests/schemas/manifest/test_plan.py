"""A plan of a release to come is refused with the versions that are read."""

import pytest

from decant.schemas.disk.atomic import write_json
from decant.schemas.manifest.plan import read_plan


def test_an_unknown_version_is_told_all_versions_that_are_read(tmp_path):
    path = tmp_path / "plan.json"
    write_json(path, {"version": 3})
    with pytest.raises(ValueError, match=r"plan\.json: plan version 3, this release reads 1 and 2"):
        read_plan(path)
