"""Everything of ours is imported below `decant`, whatever else lies in a user's directory."""

import os
import subprocess
import sys

import pytest

import decant
from tests.making.caches import tiny_cache
from tests.paths import ROOT, environment

PACKAGES = ("schemas", "models", "pipelines", "trainer")


@pytest.fixture
def project(tmp_path):
    """A user's repository with folders and a file of the same names as ours."""
    place = tmp_path / "project"
    for package in ("models", "schemas", "pipelines"):
        (place / package).mkdir(parents=True)
        (place / package / "__init__.py").write_text("MINE = True\n")
    (place / "trainer.py").write_text("MINE = True\n")
    (place / "settings.py").write_text("raise RuntimeError('not to be imported')\n")
    return place


def test_a_users_own_folders_are_theirs_and_ours_are_ours(project):
    code = (
        "import decant, models, schemas, pipelines, trainer\n"
        "assert models.MINE and schemas.MINE and pipelines.MINE and trainer.MINE\n"
        "import decant.models.config, decant.trainer.config\n"
        "assert callable(decant.open_cache) and decant.schemas and decant.pipelines"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_student_is_trained_from_a_users_repository(project, tmp_path):
    cache = tiny_cache(tmp_path, k=8)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "decant", "train", f"--cache={cache.path}", "--run=run"),
            *(f"--student.source={tmp_path / 'teacher'}", "--student.layers=1"),
            "--loss.tail=bucket",
            *("--data.batch-rows=2", "--data.steps=1", "--heldout-rows=1"),
        ],
        cwd=project,
        env=environment() | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (project / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_bare_name_is_refused_in_a_checkout(package):
    """Imported as `schemas` and as `decant.schemas`, every class would exist twice."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"write `import decant.{package}`" in done.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = decant.nothing


def test_what_decant_offers_is_listed():
    assert {"open_cache", "Cache", *PACKAGES} <= set(dir(decant))
