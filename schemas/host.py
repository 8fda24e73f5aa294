"""What this process may use of its host: memory and cores, within the limits of its container.

A container's limits are those of its control group and of every group above it. Linux tells the
groups in /proc, in two versions of the interface; both may be mounted at once.
"""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

_PROC = Path("/proc/self")


def memory_bytes(proc: Path = _PROC) -> int:
    """Bytes of memory. `proc` is the directory of the process in /proc."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_limits("memory", _memory_limit, proc)])


def cores(proc: Path = _PROC) -> int:
    """Number of cores, at least 1; a container's share of time is rounded up to whole cores."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([allowed or 1, *_limits("cpu", _core_limit, proc)]))


def _limits(controller: str, read: Callable[[Path], int], proc: Path) -> Iterator[int]:
    """The limits of the process's group and of the groups above it, as far as they have one."""
    for group in _groups(controller, proc):
        try:
            yield read(group)
        except (OSError, ValueError):
            continue  # no such file in this group, or the word `max`


def _memory_limit(group: Path) -> int:
    """Version 2's file if it is there, else version 1's, in which no limit is a huge number."""
    path = group / "memory.max"
    return int((path if path.exists() else group / "memory.limit_in_bytes").read_text())


def _core_limit(group: Path) -> int:
    """As `_memory_limit`. ValueError if there is no limit, which version 1 writes as −1."""
    if (path := group / "cpu.max").exists():
        quota, period = map(int, path.read_text().split())
    else:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        quota, period = (int((group / name).read_text()) for name in names)
    if quota <= 0 or period <= 0:
        raise ValueError(f"{group}: no limit")
    return math.ceil(quota / period)


def _groups(controller: str, proc: Path) -> Iterator[Path]:
    """Directories of the process's groups that may limit `controller`, each with those above it."""
    try:
        lines = (proc / "cgroup").read_text().splitlines()
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:
        return  # not Linux
    names = dict(line.split(":", 2)[1:] for line in lines)
    for mount in mounts:
        place, _, kind = mount.partition(" - ")
        root, top = place.split()[3:5]
        system, _, options = kind.split(maxsplit=2)
        for controllers, name in names.items():
            of_two = system == "cgroup2" and not controllers
            of_one = system == "cgroup" and controller in controllers.split(",")
            if of_two or (of_one and controller in options.split(",")):
                yield from _up_to(Path(top), _below(name, root))


def _below(name: str, root: str) -> Path:
    """The group's path below its mount. A container may see its own group as the mount's root."""
    path = Path(name)
    return path.relative_to(root) if path.is_relative_to(root) else Path()


def _up_to(top: Path, group: Path) -> Iterator[Path]:
    yield top / group
    for above in group.parents:
        yield top / above
