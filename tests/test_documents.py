"""The documents name files, commands, flags and settings that exist; their configs are valid."""

import dataclasses
import re
import tomllib

import pytest

from decant.command_line import menu
from decant.command_line.settings import parse
from decant.pipelines.config import Precompute
from decant.trainer.config import Train
from decant.trainer.results.sweep import read_sweep
from tests.making.settings_names import setting_names
from tests.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "schemas|models|pipelines|trainer|decant|tests|benchmarks|docs|examples"
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)`")
CODE = re.compile(r"^```\n(.*?)^```|`([^`\n]+)`", re.M | re.S)
COMMAND = re.compile(r"(?:^|\$ )decant ([a-z]+)\b", re.M)
TARGET = re.compile(r"`make ([a-z-]+)|^make ([a-z-]+)", re.M)
MODULE = re.compile(r"python -m (benchmarks\.\w+|decant\.[\w.]+)")
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9_.-]*[a-z0-9])")
TABLES = "corpus|teacher|signals|student|data|loss|optimiser|mesh|distributed|keep"
SETTING = re.compile(rf"`((?:{TABLES})\.[a-z_.]+)(?: = [^`]*)?`")
BLOCK = re.compile(r"^```toml\n(.*?)^```", re.M | re.S)
FOREIGN = {
    "dask_client_address",
    "dask_scheduler_file",
    "dask_partition_size",
    "flink_master",
    "environment_type",
    "environment_config",
    "parallelism",
    "spark_master_url",
    "environment",
    "project",
    "region",
    "temp_location",
    "sdk_container_image",
    "experiments",
    "extra_package",
    "requirements_file",
    "sdist",
    "repo_type",
}
"""Flags of Beam's runners and of other tools."""
MISSPELT = "sequence-lenght"
"""In the page's example of an error."""
OTHERS = {
    "help",
    "version",
    "sweep",
    "document",
    "source",
    "memory-only",
    "seconds",
    "actors",
    MISSPELT,
}
"""Flags that are no settings: of the menu, of `train`, of `forget`, of tools in this repository."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


@pages
def test_files_commands_and_targets_that_a_page_names_exist(page):
    text = page.read_text("utf-8")
    named = [path for path in PATH.findall(text) if "NAME" not in path]
    assert not [path for path in named if not (ROOT / path).exists()]
    code = "\n".join(block or inline for block, inline in CODE.findall(text))
    assert set(COMMAND.findall(code)) <= {name for group in menu.GROUPS.values() for name in group}
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
    assert {first or second for first, second in TARGET.findall(text)} <= set(targets)
    for module in MODULE.findall(text):
        place = ROOT / module.removeprefix("decant.").replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").exists(), module


@pages
def test_flags_and_settings_that_a_page_names_exist(page):
    text = page.read_text("utf-8")
    of_others = re.findall(r"(?:python -m benchmarks|python examples/|uv |pip ).*", text)
    for line in of_others:
        text = text.replace(line, "")
    names = setting_names()
    flags = {flag.removeprefix("no-").replace("-", "_") for flag in FLAG.findall(text)}
    assert flags - names - {name.replace("-", "_") for name in OTHERS | FOREIGN} == set()
    assert set(SETTING.findall(text)) - names == set()


BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{block.splitlines()[0]}")
    for page in PAGES
    for block in BLOCK.findall(page.read_text("utf-8"))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_config_in_the_documents_is_understood(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # there nobody asks whether its files are there
    path = tmp_path / "config.toml"
    path.write_text(block, encoding="utf-8")
    table = tomllib.loads(block)
    if "students" in table:
        assert len(read_sweep(path).students) == 4
        return
    of_capture = {field.name for field in dataclasses.fields(Precompute)}
    kind = Precompute if table.keys() <= of_capture else Train
    assert parse(kind, [str(path)], program="p") != kind()


def test_there_are_configs_in_the_documents():
    assert len(BLOCKS) > 10


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 130


def test_the_architecture_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rooms = [
        path.parent.name
        for package in ("schemas", "models", "pipelines", "trainer")
        for path in (ROOT / package).glob("*/__init__.py")
    ]
    assert len(rooms) > 20
    assert all(re.search(rf"\b{room}\b", text) for room in rooms)
