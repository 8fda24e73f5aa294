"""The documents name files and commands that exist."""

import re

import pytest

from decant.command_line import menu
from tests.paths import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = re.compile(r"`((?:schemas|models|pipelines|trainer|decant|tests|benchmarks|docs)/[\w./-]*)`")
COMMAND = re.compile(r"`(?:\$ )?decant (\w+)|^\$ decant (\w+)", re.M)
TARGET = re.compile(r"`make ([a-z-]+)|^make ([a-z-]+)", re.M)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_exists(document):
    text = document.read_text("utf-8")
    named = [path for path in PATH.findall(text) if "NAME" not in path]
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing
    commands = {first or second for first, second in COMMAND.findall(text)}
    assert commands <= {*menu.CACHES, *menu.STUDENTS, "COMMAND"}
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
    assert {first or second for first, second in TARGET.findall(text)} <= set(targets)


def test_the_architecture_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rooms = [
        path.parent.name
        for package in ("schemas", "models", "pipelines", "trainer")
        for path in (ROOT / package).glob("*/__init__.py")
    ]
    assert len(rooms) > 20
    assert all(re.search(rf"\b{room}\b", text) for room in rooms)
