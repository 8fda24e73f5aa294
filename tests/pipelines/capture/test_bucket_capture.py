"""Captures into a bucket: the ids and the bytes of a capture on the disk."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from decant.pipelines.capture.job import precompute
from decant.schemas import open_cache
from tests.making.caches import tiny_cache, tiny_settings


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DECANT_MIRROR", str(tmp_path / "mirror"))
    return tmp_path


def test_a_capture_into_a_bucket_has_the_ids_and_targets_of_one_on_the_disk(bucket, scratch):
    disk = tiny_cache(scratch)
    config = dataclasses.replace(tiny_settings(scratch), output=Path(bucket))
    sealed = precompute(config)
    assert sealed == disk.manifest
    assert sealed.cache_id == disk.manifest.cache_id
    there = open_cache(bucket)
    assert there.manifest == disk.manifest
    for name, array in disk.read(disk.rows()).items():
        np.testing.assert_array_equal(there.read(there.rows())[name], array)
