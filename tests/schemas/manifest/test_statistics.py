"""Statistics that parts share."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from decant.schemas.disk.identity import file_sha256
from decant.schemas.disk.layout import PartLayout
from decant.schemas.manifest.statistics import load_statistic, save_statistics, share_statistics

OTHER_DISK = Path("/dev/shm")


@pytest.fixture
def elsewhere(tmp_path):
    if not OTHER_DISK.is_dir() or OTHER_DISK.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip(f"{OTHER_DISK} is not another disk")
    directory = OTHER_DISK / tmp_path.name
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


def test_a_part_on_another_disk_gets_a_copy(tmp_path, elsewhere):
    older, part, array = tmp_path / "parts/0000", elsewhere / "parts/0001", np.arange(3.0)
    digests = save_statistics(older, {"sketch-mean": array})
    share_statistics(part, older, digests)
    ((file, sha256),) = digests.items()
    assert not (_file(older, file)).samefile(_file(part, file))
    np.testing.assert_array_equal(load_statistic(part, file, sha256=sha256), array)


def test_sharing_twice_is_sharing_once(tmp_path):
    older, part = tmp_path / "parts/0000", tmp_path / "parts/0001"
    digests = save_statistics(older, {"sketch-mean": np.arange(3.0)})
    for _ in range(2):  # the second time as a capture that was killed and goes on
        share_statistics(part, older, digests)
    assert _file(part, *digests).samefile(_file(older, *digests))
    assert [path.name for path in PartLayout(part).statistics.iterdir()] == list(digests)


def test_writing_a_shared_statistic_again_leaves_the_other_parts(tmp_path):
    older, part = tmp_path / "parts/0000", tmp_path / "parts/0001"
    digests = save_statistics(older, {"sketch-mean": np.arange(3.0)})
    share_statistics(part, older, digests)
    save_statistics(part, {"sketch-mean": np.arange(4.0)})
    ((file, sha256),) = digests.items()
    assert len(load_statistic(older, file, sha256=sha256)) == 3


def test_a_damaged_statistic_is_not_shared(tmp_path):
    older, part = tmp_path / "parts/0000", tmp_path / "parts/0001"
    digests = save_statistics(older, {"sketch-mean": np.arange(3.0)})
    _file(older, *digests).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"parts/0000/statistics/sketch-mean\.npy: checksum"):
        share_statistics(part, older, digests)
    assert not _file(part, *digests).exists()


def test_a_file_that_is_no_array_is_not_shared(tmp_path):
    older, part = tmp_path / "parts/0000", tmp_path / "parts/0001"
    path = _file(older, "sketch-mean.npy")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"sketch-mean\.npy: not an array"):
        share_statistics(part, older, {path.name: file_sha256(path)})


def _file(part: Path, name: str) -> Path:
    return PartLayout(part).statistics / name
