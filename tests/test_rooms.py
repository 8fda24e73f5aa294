"""Imports go one way: between packages, between the rooms of a package, and never in a circle.

A room is a folder of a package, or a file beside the folders. Imports inside functions count too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT

# From the lowest level up. Rooms of one level do not import each other. A package's `__init__`
# offers names from its rooms to other packages, so no room of the package imports it.
LEVELS = {
    "decant": [
        ["__init__", "foreign"],
        ["store"],
        ["command_line", "progress", "served_losses"],
        ["schemas"],
        ["models"],
        ["pipelines", "trainer", "torch"],
        ["library"],
        ["__main__"],
    ],
    "command_line": [
        ["menu", "local_paths", "closed_output", "python_values"],
        ["kinds", "value_types", "docstrings", "guide"],
        ["checks", "config_paths"],
        ["parser", "fields", "result"],
        ["arguments", "config_file", "help_page"],
        ["settings"],
        ["__init__"],
    ],
    "store": [
        ["urls", "base", "troubles", "whole_file", "retry_after"],
        ["patience", "credentials", "posix"],
        ["clients", "objects"],
        ["opening", "mirrored_file"],
        ["mirror"],
        ["__init__"],
    ],
    "schemas": [
        ["disk", "host"],
        ["targets"],
        ["codecs"],
        ["signals"],
        ["records", "arrays"],
        ["manifest"],
        ["reading"],
        ["__init__"],
    ],
    "models": [
        ["rotary", "numerics", "parameters", "json_file"],
        ["config"],
        ["families", "mesh", "text"],
        ["decoder", "prequantised"],
        ["checkpoints"],
        ["__init__"],
    ],
    "pipelines": [
        ["stopping", "config"],
        ["runners", "upkeep", "inspection"],
        ["rows"],
        ["teacher"],
        ["calibration", "init"],
        ["capture"],
        ["alignment"],
        ["verification"],
        ["commands"],
        ["__main__"],
        ["__init__"],
    ],
    "trainer": [
        ["loss"],
        ["config"],
        ["update", "data"],
        ["judging"],
        ["run", "own_loop"],
        ["results"],
        ["__main__"],
        ["__init__"],
    ],
    "torch": [
        ["settings", "packing", "rows", "on_policy"],
        ["targets", "layer_terms", "batching"],
        ["tail_prior", "sketches", "counts"],
        ["student_view"],
        ["divergences"],
        ["sorted_probabilities"],
        ["chunks"],
        ["losses"],
        ["judging"],
        ["hf_trainer"],
        ["__init__"],
    ],
}
# Third-party packages that a package must not need.
WITHOUT = {
    "store": {"jax", "flax", "optax", "apache_beam", "torch"},
    "schemas": {"jax", "flax", "optax", "apache_beam", "torch"},
    "models": {"apache_beam"},
    "trainer": {"apache_beam"},
    "torch": {"jax", "flax", "optax", "grain", "tyro", "apache_beam"},
}
PACKAGES = ("command_line", "store", "schemas", "models", "pipelines", "trainer", "torch")


def files(package: str) -> list[Path]:
    folder = ROOT / "decant"
    return sorted(folder.glob("*.py") if package == "decant" else (folder / package).rglob("*.py"))


def module(path: Path) -> str:
    """`decant.schemas.disk.layout`; a room's or package's `__init__` has its folder's name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for package in PACKAGES for path in files(package)}


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, wherever in it, ours by the longest name that is one."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide the room"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else str(node.module)


def room(name: str, package: str) -> str | None:
    """The room of `package` that a module lies in; None if it lies in another package."""
    parts = name.split(".")
    inside = parts[1:] if package == "decant" else parts[2:]
    if parts[0] != "decant" or (package != "decant" and parts[1:2] != [package]):
        return None
    return inside[0] if inside else "__init__"


def upward(package: str, of: str) -> list[str]:
    """Imports of the room `of` that lead to its own level or higher."""
    level = {name: number for number, names in enumerate(LEVELS[package]) for name in names}
    wrong = []
    paths = [*files("decant"), *MODULES.values()] if package == "decant" else files(package)
    for path in paths:
        if room(module(path), package) != of:
            continue
        for name in imported(path):
            target = room(name, package)
            if target not in (None, of) and level[target] >= level[of]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    return wrong


@pytest.mark.parametrize(
    ("package", "of"),
    [
        (package, of)
        for package in LEVELS
        for names in LEVELS[package]
        for of in names
        if of != "__init__"
    ],
)
def test_a_room_imports_only_rooms_below_it(package, of):
    assert upward(package, of) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_has_a_level_and_says_what_it_holds(package):
    folder = ROOT / "decant" / package
    there = {path.stem for path in folder.glob("*.py")}
    there |= {path.parent.name for path in folder.glob("*/__init__.py")}
    assert there == {name for names in LEVELS[package] for name in names}
    for path in files(package):
        docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
        assert docstring, f"{path} has no first line that says which idea it holds"


@pytest.mark.parametrize("package", WITHOUT)
def test_a_package_needs_none_of_what_it_must_not(package):
    for path in files(package):
        needed = {name.split(".")[0] for name in imported(path)}
        assert not needed & WITHOUT[package], path


def test_there_is_no_circle():
    offers = {f"decant.{package}" for package in PACKAGES}
    below = {
        name: set(imported(path)) & set(MODULES) - offers
        for name, path in MODULES.items()
        if name not in offers
    }
    done: set[str] = set()
    while len(done) < len(below):
        free = {name for name, needs in below.items() if name not in done and needs <= done}
        assert free, sorted(set(below) - done)
        done |= free
