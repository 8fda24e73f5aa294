"""Files appear whole, or not at all."""

import pytest

from decant.store.whole_file import beside, is_temporary, write_whole


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "made" / "file.json"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_bytes(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def broken():
        with beside(path) as temporary:
            temporary.write_bytes(b"ne")
            assert is_temporary(temporary)
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        broken()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "is_one"), [(".a.1.2.tmp", True), ("a.tmp", False), (".a.json", False)]
)
def test_what_is_being_written_is_known_by_its_name(tmp_path, name, is_one):
    assert is_temporary(tmp_path / name) == is_one
