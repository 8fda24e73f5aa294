"""Files inside a directory are made, moved and deleted without following a link below it."""

from pathlib import Path

import pytest

from decant.schemas.disk import inside
from decant.schemas.disk.atomic import write_bytes
from decant.schemas.disk.layout import cache_of, part_layout


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/diary").write_text("kept")
    (tmp_path / "root/real").mkdir(parents=True)
    (tmp_path / "root/link").symlink_to(tmp_path / "home")
    return tmp_path / "root"


def test_the_root_itself_may_be_a_link(root):
    (root.parent / "other").symlink_to(root)
    write_bytes(root.parent / "other/new/file", b"1", within=root.parent / "other")
    assert (root / "new/file").read_bytes() == b"1"


@pytest.mark.parametrize("below", ["link", "link/deeper", "real/../link", "../home", "/etc"])
def test_no_way_leads_out(root, below):
    refused = pytest.raises(ValueError, match=r"is a link or no directory|is not inside")
    with refused, inside.directory(root, Path(below), make=True):
        pass
    with refused:
        inside.remove(root, Path(below, "diary"))
    (root / "real/file").write_text("new")
    with refused:
        inside.move(root, Path("real/file"), Path(below, "diary"))
    assert [path.read_text() for path in (root.parent / "home").iterdir()] == ["kept"]


def test_of_a_link_the_link_is_deleted_also_inside_a_directory(root):
    (root / "real/link").symlink_to(root.parent / "home")
    inside.remove(root, Path("real"))
    inside.remove(root, Path("link"))
    inside.remove(root, Path("not/there"))
    assert list(root.iterdir()) == []
    assert (root.parent / "home/diary").read_text() == "kept"


def test_a_file_is_written_over_a_link_and_not_through_it(root):
    (root / "real/file").symlink_to(root.parent / "home/diary")
    write_bytes(root / "real/file", b"new", within=root)
    assert not (root / "real/file").is_symlink()
    assert (root.parent / "home/diary").read_text() == "kept"


@pytest.mark.parametrize(
    ("file", "cache"),
    [
        (part_layout(Path("/a/cache"), 3).commit("hidden/1", 7), Path("/a/cache")),
        (part_layout(Path("cache"), 0).plan, Path("cache")),
        (part_layout(Path("cache/gc/012345"), 0).records("rows", 0), Path("cache/gc/012345")),
        (part_layout(Path(), 0).work / "rows.json", Path()),
        (part_layout(Path("/"), 12345).statistics / "x.npy", Path("/")),
        (part_layout(Path("/a/parts/0001/cache"), 0).request, Path("/a/parts/0001/cache")),
        (Path("/a/run/evaluation.json"), None),
        (Path("/a/parts/0001/run/evaluation.txt"), None),
    ],
)
def test_the_cache_of_a_part_s_file_is_found(file, cache):
    assert cache_of(file) == cache


def test_more_bytes_than_allowed_are_an_error(root):
    (root / "real/one").write_bytes(b"12345")
    (root / "real/inner").mkdir()
    (root / "real/inner/two").write_bytes(b"678")
    held = inside.regular_files(root, Path("real"), most=8)
    assert held == {"one": b"12345", "inner/two": b"678"}
    with pytest.raises(ValueError, match="its files are too large, at one"):
        inside.regular_files(root, Path("real"), most=7)
