"""What a runner's workers install: our packages as one sdist, in an environment of their own.

Not part of `make test`, because it installs from an index: `make package`.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.making.caches import tiny_cache, tiny_settings
from tests.paths import ROOT

pytestmark = pytest.mark.package


def run(*command: str | Path, at: Path) -> str:
    """Its standard output; nothing of this checkout is on its path."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=at, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "uv", "build", "--sdist", "-o", place, ROOT, at=place)
    (found,) = place.glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def worker(sdist) -> Path:
    return installed(sdist, "precompute")


def installed(sdist: Path, extra: str) -> Path:
    """The Python of an environment with the sdist and one of its extras."""
    place = sdist.parent
    environment = place / extra
    uv = [sys.executable, "-m", "uv"]
    run(*uv, "venv", "--python", sys.executable, environment, at=place)
    python = environment / "bin" / "python"
    run(*uv, "pip", "install", "--python", python, f"{sdist}[{extra}]", at=place)
    return python


def test_the_sdist_has_the_licence_and_every_module(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    ours = {
        path.relative_to(ROOT).as_posix()
        for package in ("schemas", "models", "pipelines", "trainer")
        for suffix in ("py", "html")
        for path in (ROOT / package).rglob(f"*.{suffix}")
    }
    assert ours | {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_a_worker_that_installed_it_captures_the_same_cache(worker, tmp_path):
    expected = tiny_cache(tmp_path).manifest.cache_id
    config = tiny_settings(tmp_path, output=tmp_path / "by-the-worker")
    said = run(
        *(worker, "-m", "decant.pipelines", "precompute"),
        *("--corpus.files", *config.corpus.files),
        f"--corpus.sequence-length={config.corpus.sequence_length}",
        f"--corpus.heldout={config.corpus.heldout}",
        f"--corpus.shard-bytes={config.corpus.shard_bytes}",
        f"--teacher.model={config.teacher.model}",
        f"--teacher.batch-rows={config.teacher.batch_rows}",
        *("--signals.logits.k=8", "--signals.logits.draws=0", "--signals.logits.profile=lossless"),
        f"--output={config.output}",
        "--tokenise-workers=2",
        at=tmp_path,
    )
    assert f"cache_id {expected}" in said
    page = tmp_path / "row.html"
    run(worker, "-m", "decant.pipelines", "inspect", config.output, "--html", page, at=tmp_path)
    assert "<html" in page.read_text()


def test_a_reader_needs_no_jax(sdist, tmp_path):
    cache = tiny_cache(tmp_path).path
    python = installed(sdist, "reader")
    code = (
        "import sys, importlib.util; from decant import open_cache; "
        "cache = open_cache(sys.argv[1]); print(cache.read(cache.rows())['topk_ids'].shape); "
        "assert not importlib.util.find_spec('jax')"
    )
    assert run(python, "-c", code, cache, at=tmp_path).startswith("(")
