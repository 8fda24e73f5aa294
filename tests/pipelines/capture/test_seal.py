"""Sealing refuses rows and commits that are not those of the plan."""

import pytest

from decant.pipelines.capture.seal import seal
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.disk.layout import PartLayout
from decant.schemas.manifest.plan import read_plan


@pytest.fixture
def unsealed(grown, tmp_path) -> PartLayout:
    cache = grown.copied(tmp_path) / "cache"
    (cache / "manifest.json").unlink()
    return PartLayout(cache / "parts/0000")


def sealed(layout: PartLayout):
    return seal(layout.root.parents[1], layout, read_plan(layout.plan))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signal_id": "f" * 64}, "commit of unit 1 and signal f{12}, expected unit 1 and"),
        ({"unit": 2}, "commit of unit 2 and signal .*, expected unit 1"),
        ({"file": {"records": 99}}, "99 rows of logits for . rows of unit 1"),
    ],
)
def test_a_commit_that_differs_from_the_plan_is_named(unsealed, change, message):
    path = unsealed.commit("logits", 1)
    commit = read_json(path)
    if "file" in change:
        change = {"file": commit["file"] | change["file"]}
    write_json(path, commit | change)
    with pytest.raises(ValueError, match=rf"logits-unit-00001.json: {message}"):
        sealed(unsealed)
    assert not (unsealed.root.parents[1] / "manifest.json").exists()


def test_missing_rows_are_named(unsealed):
    unsealed.records("rows", 1).unlink()
    with pytest.raises(ValueError, match=r"rows/unit-00001.array_record: .* is missing"):
        sealed(unsealed)


def test_an_unchanged_part_is_sealed_as_before(grown, unsealed):
    (part,) = sealed(unsealed).parts
    assert part == grown.cache.manifest.parts[0]
