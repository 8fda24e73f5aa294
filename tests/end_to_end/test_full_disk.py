"""The disk fills up at every kind of write, or the output is read-only."""

import contextlib
import importlib
import io
import itertools
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Attention, Hidden
from decant.schemas import open_cache
from tests.making.caches import tiny_cache, tiny_settings, write_corpus

SIGNALS = {
    "profile": "fast",
    "draws": 3,
    "shard_bytes": 2048,
    "hidden": Hidden(layers=(1,), dtype="int8", width=6),
    "attention": Attention(layers=(1,)),
}

FULL = "No space left|File too large"
# By what is written, in order: module, function, and the call of it before which the disk fills up.
WRITES = {
    "request": ("decant.schemas.manifest.request", "write_json", 1),
    "tokenizer": ("decant.schemas.manifest.tokenizer_files", "write_bytes", 1),
    "rows": ("decant.pipelines.rows.shard", "write_records", 2),
    "a shard of rows": ("decant.pipelines.rows.shard", "write_json", 1),
    "statistics": ("decant.pipelines.calibration.calibrate", "save_statistics", 1),
    "plan": ("decant.pipelines.calibration.calibrate", "write_plan", 1),
    "metadata of an array": ("decant.pipelines.capture.remaining_units", "create_array", 1),
    "an array": ("decant.schemas.arrays.writer", "write_bytes", 3),
    "logits": ("decant.pipelines.capture.unit", "write_records", 2),
    "commit": ("decant.schemas.manifest.commits", "write_commit", 2),
    "manifest": ("decant.pipelines.capture.seal", "write_manifest", 1),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("full")
    write_corpus(root / "corpus", files=4, words=120)
    return root


@pytest.fixture(scope="module")
def undisturbed(root) -> str:
    return tiny_cache(root, **SIGNALS).manifest.cache_id


Disk = tuple[Path, Callable[[], None], Callable[[], None]]
"""A directory, a function that fills its disk, and one that frees space again."""


@pytest.fixture
def disk(request, tmp_path) -> Iterator[Disk]:
    with DISKS[request.param](tmp_path) as disk:
        yield disk


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[Disk]:
    options = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(directory)]
    if subprocess.run(options, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    ballast = directory / "ballast"

    def fill() -> None:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)) == 4096:
                pass

    try:
        yield directory, fill, ballast.unlink
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@contextlib.contextmanager
def small_files(directory: Path) -> Iterator[Disk]:
    """A limit on the size of files: writes end in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    try:
        yield directory, lambda: limit(64), lambda: limit(soft)
    finally:
        limit(soft)


DISKS = {"full": small_disk, "limited": small_files}


@pytest.mark.parametrize("disk", DISKS, indirect=True)
def test_a_run_fails_at_any_write_without_space_and_goes_on_with_space(root, undisturbed, disk):
    directory, fill, free = disk
    output = directory / "cache"
    config = tiny_settings(root, **SIGNALS, output=output)
    # Not to stdout: pytest captures it in a file, to which the limit applies too.
    quiet = Console(file=io.StringIO())
    for write, (module, name, calls) in WRITES.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{module}.{name}", filling(module, name, calls, fill=fill))
            with pytest.raises((OSError, RuntimeError), match=FULL):
                precompute(config, console=quiet)
        free()
        with pytest.raises(ValueError, match=r"not sealed|no manifest|no such cache"):
            open_cache(output)
        assert not list(directory.rglob("*.tmp")), write
    assert precompute(config, console=quiet).cache_id == undisturbed
    cache = open_cache(output)
    cache.read(cache.rows(), signals=tuple(cache.manifest.signals))


def filling(module: str, name: str, calls: int, *, fill: Callable[[], None]) -> Callable:
    """The function, which calls `fill` before its call number `calls`."""
    original, left = getattr(importlib.import_module(module), name), itertools.count(1)

    def call(*args, **kwargs):
        if next(left) == calls:
            fill()
        return original(*args, **kwargs)

    return call


def test_a_read_only_output_is_an_error_before_anything_runs(root, undisturbed, tmp_path):
    options = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    mounted = not subprocess.run(options, capture_output=True, check=False).returncode
    if not mounted:
        tmp_path.chmod(0o500)
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere, and mounting is not possible")
    try:
        config = tiny_settings(root, **SIGNALS, output=tmp_path / "cache")
        with pytest.raises(OSError, match=r"(Read-only|denied).*cache"):
            precompute(config)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
