"""Limits of containers, in both versions of control groups, from files like those of Linux."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from decant.schemas.host import cores, memory_bytes
from tests.paths import environment

MIB = 1 << 20
UNLIMITED = 9223372036854771712
"""What version 1 writes if there is no limit."""


@pytest.fixture
def proc(tmp_path) -> Path:
    """The process's directory in /proc; its groups are below `tmp_path`/sys."""
    (tmp_path / "proc").mkdir()
    return tmp_path / "proc"


def mount(proc: Path, *, version: int, group: str, root: str = "/", **files: object) -> Path:
    """Mount a hierarchy and put the process into a group; returns the mount's directory.

    `files` are contents in the mount's directory by file name, with `_` for the first dot.
    """
    names = {1: "memory,cpu", 2: ""}
    top = proc.parent / "sys" / f"v{version}"
    top.mkdir(parents=True)
    kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory,cpu"
    with (proc / "mountinfo").open("a") as file:
        file.write("23 1 8:1 / / rw,relatime - ext4 /dev/root rw\n")
        file.write(f"32 23 0:29 {root} {top} rw,nosuid shared:9 - {kind}\n")
    with (proc / "cgroup").open("a") as file:
        file.write(f"{2 - version + 3 * (version == 1)}:{names[version]}:{group}\n")
    limit(top, **files)
    return top


def limit(group: Path, **files: object) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (group / name.replace("_", ".", 1)).write_text(f"{content}\n")


def test_without_groups_the_host_s_own_numbers_count(tmp_path):
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory_bytes(tmp_path) == physical
    assert cores(tmp_path) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("version", [1, 2])
def test_no_limit_is_no_limit(proc, tmp_path, version):
    top = mount(proc, version=version, group="/a")
    if version == 2:
        limit(top / "a", memory_max="max", cpu_max="max 100000")
    else:
        limit(top / "a", memory_limit_in_bytes=UNLIMITED, cpu_cfs_quota_us=-1)
        limit(top / "a", cpu_cfs_period_us=100000)
    assert memory_bytes(proc) == memory_bytes(tmp_path)
    assert cores(proc) == cores(tmp_path)


def test_the_smallest_limit_of_nested_groups_counts_in_version_2(proc):
    top = mount(proc, version=2, group="/kube/pod/main")
    limit(top / "kube", memory_max=900 * MIB)
    limit(top / "kube/pod", memory_max=300 * MIB, cpu_max="50000 100000")
    limit(top / "kube/pod/main", memory_max="max", cpu_max="max 100000")
    assert memory_bytes(proc) == 300 * MIB
    assert cores(proc) == 1


def test_the_smallest_limit_of_nested_groups_counts_in_version_1(proc):
    top = mount(proc, version=1, group="/docker/ab", memory_limit_in_bytes=UNLIMITED)
    limit(top / "docker", memory_limit_in_bytes=200 * MIB)
    limit(top / "docker/ab", memory_limit_in_bytes=500 * MIB)
    limit(top / "docker/ab", cpu_cfs_quota_us=90000, cpu_cfs_period_us=100000)
    assert memory_bytes(proc) == 200 * MIB
    assert cores(proc) == 1


@pytest.mark.parametrize(
    ("group", "root"), [("/docker/ab", "/docker/ab"), ("/", "/"), ("/x", "/y")]
)
def test_a_container_that_sees_its_own_group_as_the_root(proc, group, root):
    mount(proc, version=2, group=group, root=root, memory_max=100 * MIB)
    assert memory_bytes(proc) == 100 * MIB


def test_both_versions_may_be_mounted_and_files_may_be_missing(proc):
    mount(proc, version=2, group="/only/processes")
    mount(proc, version=1, group="/a", memory_limit_in_bytes=70 * MIB)
    assert memory_bytes(proc) == 70 * MIB


def test_cores_are_rounded_up_and_no_more_than_this_process_may_use(proc):
    mount(proc, version=2, group="/", cpu_max="150000 100000")
    assert cores(proc) == min(2, len(os.sched_getaffinity(0)))


def test_a_real_process_on_one_core_has_one():
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n" + (
        "from decant.schemas.host import cores; print(cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True)
    assert done.stdout == b"1\n"
