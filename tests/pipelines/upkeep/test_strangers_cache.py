"""A cache from a stranger: no command writes, deletes or copies anything outside of it."""

import os
import shutil
from pathlib import Path

import pytest

from decant.models.text.tokenizer import tokenizer_of
from decant.pipelines.__main__ import main
from decant.pipelines.capture.job import precompute
from decant.schemas import open_cache
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.manifest.commits import load_commit
from decant.schemas.manifest.manifest import read_manifest
from tests.making.grown import hashes, settings

SECRET = "nobody else's"


@pytest.fixture
def place(grown, tmp_path) -> Path:
    """A directory with the stranger's `cache`, its corpus and teacher, and a `home` of ours."""
    grown.copied(tmp_path)
    (tmp_path / "home/letters").mkdir(parents=True)
    for name in ("diary", "letters/one", ".bashrc"):
        (tmp_path / "home" / name).write_text(SECRET)
    return tmp_path


def edited(file: Path, change) -> None:
    """Change the JSON in a file of the format, so that its checksum is right."""
    value = read_json(file)
    change(value)
    write_json(file, value)


def replaced_by_link(path: Path, target: Path) -> None:
    """Put a link in the place of a file or directory, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize(
    "link",
    ["parts/0000/commits", "parts/0000/statistics", "parts/0000/hidden", "parts/0000", "gc"],
)
def test_gc_deletes_nothing_behind_a_link(place, link, capsys):
    before = hashes(place / "home")
    replaced_by_link(place / "cache" / link, place / "home")
    assert main(["gc", str(place / "cache")]) == (link != "gc")
    assert hashes(place / "home") == before
    if link != "gc":
        assert f"{link}: is a link or no directory" in capsys.readouterr().err


def test_a_part_that_lies_in_another_cache_is_refused_unless_it_was_merged(place, grown, capsys):
    shutil.copytree(place / "cache", place / "victim")
    before = hashes(place / "victim")

    def change(manifest):
        manifest["parts"][0]["path"] = "../victim/parts/0000"
        manifest["parts"][0]["signals"].pop("hidden/1")

    edited(place / "cache/manifest.json", change)
    for command in (["gc"], ["forget", "--source", "a-more-0.txt"], ["verify", "--repair"]):
        assert main([command[0], str(place / "cache"), *command[1:]]) > 0
        assert "not a name of a part, such as parts/0000" in capsys.readouterr().err
    assert hashes(place / "victim") == before


def test_files_of_a_merged_cache_s_parts_are_never_written(place, grown, capsys):
    assert main(["merge", str(place / "merged"), str(place / "cache")]) == 0
    damaged = place / "cache/parts/0000/hidden/1/zarr.json"
    damaged.write_text("{}")
    before = hashes(place / "cache")
    capsys.readouterr()
    assert main(["verify", str(place / "merged"), "--rows=0", "--repair"]) == 1
    assert "it belongs to another cache" in capsys.readouterr().out
    assert main(["remove", str(place / "merged"), "attention/1"]) == 0
    assert main(["gc", str(place / "merged")]) == 0
    assert hashes(place / "cache") == before


@pytest.mark.parametrize("name", ["../home/.bashrc", "/etc/passwd", "parts/0000/../../../x"])
def test_a_journal_moves_nothing_out_of_the_cache(place, name):
    cache = place / "cache"
    (cache / "gc").mkdir()
    (cache / "home").mkdir()
    (cache / "home/.bashrc").write_text("run me")
    value = read_json(cache / "manifest.json")
    journal = {"moves": [name], "manifest": value, "cache_id": "0" * 64}
    del value["cache_id"]
    write_json(cache / "gc.json", {**journal, "replaces": read_manifest_id(cache)})
    before = hashes(place / "home")
    main(["gc", str(cache)])
    assert hashes(place / "home") == before
    open_cache(cache)


def read_manifest_id(cache: Path) -> str:
    return read_manifest(cache, during_gc=True).cache_id


def renamed_signal(manifest, name: str) -> None:
    for part in manifest["parts"]:
        part["signals"][name] = part["signals"].pop("hidden/1")
        for unit in part["units"]:
            unit["files"][name] = unit["files"].pop("hidden/1")


@pytest.mark.parametrize("name", ["hidden/../../../../x", "hidden/", "hidden/1/..", "/hidden/1"])
def test_a_signal_s_name_cannot_lead_out_of_the_cache(place, name, capsys):
    edited(place / "cache/manifest.json", lambda manifest: renamed_signal(manifest, name))
    before = hashes(place)
    assert main(["verify", str(place / "cache"), "--rows=0", "--repair"]) == 2
    assert "is not a name of a signal, such as logits" in capsys.readouterr().err
    assert hashes(place) == before


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("manifest.json", lambda m: m["parts"][0]["statistics"].update({"../x.npy": "0"}), "stati"),
        ("manifest.json", lambda m: m["parts"][0].update(numbers=[-1]), "is not the number"),
        ("manifest.json", lambda m: m["parts"][0].update(numbers=["../../x"]), "is not the number"),
        ("manifest.json", lambda m: m["parts"][0].update(path="/etc"), "name of a part"),
        ("manifest.json", lambda m: m["parts"][0].update(path=["parts/0000"]), "name of a part"),
        ("manifest.json", lambda m: m.update(parts=[7]), "not a manifest"),
    ],
)
def test_names_in_the_manifest_are_checked_when_it_is_read(place, file, change, said):
    edited(place / "cache" / file, change)
    with pytest.raises(ValueError, match=rf"{file}: .*{said}"):
        open_cache(place / "cache")


def test_names_in_a_commit_are_checked_when_it_is_read(place):
    commit = place / "cache/parts/0000/commits/hidden-1-unit-00000.json"

    def change(value):
        value["shards"]["hidden/1"][0]["name"] = "../../../../home/diary"

    edited(commit, change)
    with pytest.raises(ValueError, match=r"unit-00000\.json: not a commit: .* of a shard file"):
        load_commit(commit)


def test_names_in_a_plan_are_checked_when_it_is_read(place, capsys):
    def change(plan):
        plan["signals"]["hidden/../../../x"] = plan["signals"].pop("hidden/1")

    edited(place / "cache/parts/0000/plan.json", change)
    with pytest.raises(ValueError, match=r"plan\.json: not a plan: .*not a name of a signal"):
        precompute(settings(place))


@pytest.mark.parametrize("target", ["home/diary", "/dev/zero"])
def test_of_the_tokenizer_only_regular_files_are_copied(place, target):
    cache = place / "cache"
    for name in ("special_tokens_map.json", "notes.txt"):
        replaced_by_link(cache / "tokenizer" / name, place / target)
    os.mkfifo(cache / "tokenizer/pipe")
    assert main(["merge", str(place / "merged"), str(cache)]) == 0
    copied = {path.name for path in (place / "merged/tokenizer").iterdir()}
    assert {"tokenizer.json", "config.json"} <= copied
    assert not copied & {"special_tokens_map.json", "notes.txt", "pipe"}
    assert SECRET.encode() not in tokenizer_of(open_cache(cache)).files().values()


def test_a_lock_file_that_is_a_link_is_refused_and_its_target_kept(place, capsys):
    replaced_by_link(place / "cache/.seal.lock", place / "home/diary")
    assert main(["remove", str(place / "cache"), "hidden/1"]) == 1
    assert (place / "home/diary").read_text() == SECRET


@pytest.mark.parametrize("directory", ["logits", "commits", "hidden/1", "hidden"])
def test_repair_writes_nothing_behind_a_link(place, directory, capsys):
    part = place / "cache/parts/0000"
    replaced_by_link(part / directory, place / "home/letters")
    before = hashes(place / "home")
    assert main(["verify", str(place / "cache"), "--rows=0", "--repair"]) == 2
    assert "is a link or no directory" in capsys.readouterr().err
    assert hashes(place / "home") == before


def test_a_capture_goes_on_nowhere_behind_a_link(place):
    cache = place / "cache"
    (cache / "manifest.json").unlink()
    replaced_by_link(cache / "parts/0001/logits", place / "home")
    with pytest.raises(Exception, match="is a link or no directory"):
        precompute(settings(place))
    (cache / "parts/0000/work").symlink_to(place / "home")
    with pytest.raises(Exception, match="is a link or no directory"):
        precompute(settings(place))
    assert {path.name for path in (place / "home").iterdir()} == {"diary", "letters", ".bashrc"}


@pytest.mark.parametrize("file", ["manifest.json", "parts/0000/request.json"])
def test_a_device_or_pipe_in_the_place_of_a_file_is_an_error_at_once(place, file):
    path = place / "cache" / file
    replaced_by_link(path, Path("/dev/zero"))
    with pytest.raises(ValueError, match=f"{file}: not a regular file"):
        read_json(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{file}: not a regular file"):
        read_json(path)
