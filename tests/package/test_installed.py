"""The sdist that a runner's workers install, and the wheel that a user installs.

Each is tried in an environment of its own. `make package` runs this file; `make test` does not,
because an index is needed.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.making.caches import tiny_cache, tiny_settings
from tests.paths import ROOT

pytestmark = pytest.mark.package


def run(*command: str | Path, at: Path) -> str:
    """Standard output of a command that does not have this checkout on its path."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=at, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    """The sdist, and the wheel built from it. A wheel built in a checkout would leave `build/`."""
    place = tmp_path_factory.mktemp("archives")
    run(sys.executable, "-m", "uv", "build", "-o", place, ROOT, at=place)
    return place


@pytest.fixture(scope="module")
def sdist(archives) -> Path:
    (built,) = archives.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(archives) -> Path:
    (built,) = archives.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def worker(sdist) -> Path:
    return installed(sdist, "precompute")


def installed(package: Path, extra: str) -> Path:
    """The Python of an environment with the sdist or wheel and one of its extras."""
    place = package.parent
    environment = place / f"{package.suffix[1:]}-{extra}"
    uv = [sys.executable, "-m", "uv"]
    run(*uv, "venv", "--python", sys.executable, environment, at=place)
    python = environment / "bin" / "python"
    run(*uv, "pip", "install", "--python", python, f"{package}[{extra}]", at=place)
    return python


def test_the_archives_have_the_licence_and_every_module(sdist, wheel):
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym()]
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    ours = {
        f"decant/{path.relative_to(ROOT)}"
        for package in ("schemas", "models", "pipelines", "trainer")
        for suffix in ("py", "html", "css")
        for path in (ROOT / package).rglob(f"*.{suffix}")
    }
    ours |= {f"decant/{path.name}" for path in (ROOT / "decant").glob("*.py")}
    assert ours | {"LICENSE", "README.md", "pyproject.toml"} <= in_sdist
    assert ours <= in_wheel
    assert {name.partition("/")[0].partition("-")[0] for name in in_wheel} == {
        "decant",
        "decant_distill",
    }


def test_a_worker_that_installed_it_captures_the_same_cache(worker, tmp_path):
    expected = tiny_cache(tmp_path).manifest.cache_id
    config = tiny_settings(tmp_path, output=tmp_path / "by-the-worker")
    said = run(
        *(worker, "-m", "decant", "precompute"),
        *("--corpus.files", *config.corpus.files),
        f"--corpus.sequence-length={config.corpus.sequence_length}",
        f"--corpus.heldout={config.corpus.heldout}",
        f"--corpus.shard-bytes={config.corpus.shard_bytes}",
        f"--teacher.model={config.teacher.model}",
        f"--teacher.batch-rows={config.teacher.batch_rows}",
        *("--signals.logits.k=8", "--signals.logits.draws=0", "--signals.logits.profile=lossless"),
        *("--signals.logits.counts=0", "--signals.logits.sketch.rank=0"),
        f"--output={config.output}",
        "--tokenise-workers=2",
        at=tmp_path,
    )
    assert f"cache_id {expected}" in said
    page = tmp_path / "row.html"
    run(worker, "-m", "decant", "inspect", config.output, "--html", page, at=tmp_path)
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


def test_a_user_with_folders_of_the_same_names_trains(wheel, tmp_path):
    """Beside a user's own `models/`, `schemas/` and `trainer.py`, which stay theirs."""
    cache = tiny_cache(tmp_path, k=8).path
    python = installed(wheel, "train")
    project = tmp_path / "project"
    for package in ("models", "schemas"):
        (project / package).mkdir(parents=True)
        (project / package / "__init__.py").write_text("MINE = True\n")
    (project / "trainer.py").write_text("MINE = True\n")
    code = (
        "import decant, models, schemas, trainer; "
        "assert models.MINE and schemas.MINE and trainer.MINE; print(decant.open_cache)"
    )
    assert "function open_cache" in run(python, "-c", code, at=project)
    decant = python.with_name("decant")
    assert run(decant, "--version", at=project).startswith("decant ")
    run(
        *(decant, "train", f"--cache={cache}", "--run=run", "--loss.tail=bucket"),
        *(f"--student.source={tmp_path / 'teacher'}", "--student.layers=1"),
        *("--data.batch-rows=2", "--data.steps=1", "--heldout-rows=1"),
        at=project,
    )
    assert (project / "run" / "metrics.jsonl").exists()
    for bare in ("pipelines", "schemas.disk", "models.families"):
        done = subprocess.run([python, "-c", f"import {bare}"], cwd=project, check=False)
        assert done.returncode == 1, bare


def test_the_bare_names_are_not_installed(wheel, tmp_path):
    python = installed(wheel, "reader")
    for bare in ("schemas", "models", "pipelines", "trainer"):
        code = f"import importlib.util; assert importlib.util.find_spec({bare!r}) is None"
        run(python, "-c", code, at=tmp_path)
