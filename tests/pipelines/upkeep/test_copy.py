"""`copy`: a cache goes to a bucket and back byte by byte; a stopped copy is no cache."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from decant.__main__ import main
from decant.pipelines.upkeep.copy import copy
from decant.pipelines.upkeep.merge import merge
from decant.pipelines.upkeep.remove import remove_signals
from decant.pipelines.verification.structure import check_structure
from decant.schemas import open_cache
from decant.schemas.disk.stand_in import is_data
from decant.schemas.manifest.manifest import parse_manifest, read_manifest, write_manifest
from decant.store import open_store
from tests.making.fault_proxy import FaultProxy
from tests.making.grown import hashes
from tests.making.uploaded import upload
from tests.paths import environment


@pytest.fixture
def cache(grown, tmp_path) -> Path:
    """A cache of two parts with records, states and maps, and without its lock files."""
    shutil.copytree(
        grown.root / "cache", tmp_path / "cache", ignore=shutil.ignore_patterns("*.lock")
    )
    return tmp_path / "cache"


def files_of(cache: Path) -> dict[str, str]:
    return {name: sha for name, sha in hashes(cache).items() if not name.endswith(".lock")}


def test_to_a_bucket_and_back_it_has_the_same_bytes_and_nothing_is_sent_twice(
    cache, bucket, tmp_path
):
    before = files_of(cache)
    for folder in ("parts/0000/work", "parts/0002/rows", "gc"):
        (cache / folder).mkdir(parents=True)
        (cache / folder / "left-over").write_bytes(b"belongs to no sealed cache")
    there = copy(cache, bucket)
    assert there.files == len(before)
    assert len(before) - repeated(cache) <= there.sent <= len(before), "one content is sent once"
    manifest = open_store(bucket).get("manifest.json")
    assert parse_manifest(manifest, where=bucket).by_content
    back = copy(bucket, tmp_path / "back")
    assert files_of(tmp_path / "back") == before
    assert back.sent == len(before)
    assert check_structure(tmp_path / "back", read_manifest(tmp_path / "back")).problems == []
    for source, target in ((cache, bucket), (bucket, tmp_path / "back"), (bucket, f"{bucket}-2")):
        again = copy(source, target)
        assert again.files == len(before)
        assert (again.sent > 0) == (target == f"{bucket}-2")
    assert copy(tmp_path / "back", tmp_path / "third").sent == len(before)
    assert files_of(tmp_path / "third") == before


def repeated(cache: Path) -> int:
    """Files with data that other files of the cache have too."""
    hashes = [sha for name, sha in files_of(cache).items() if is_data(Path(name))]
    return len(hashes) - len(set(hashes))


def shared_statistics(cache: Path) -> list[tuple[Path, Path]]:
    """Pairs of equal statistics of the two parts."""
    first, second = (cache / part.path / "statistics" for part in read_manifest(cache).parts)
    both = {path.name for path in first.iterdir()} & {path.name for path in second.iterdir()}
    pairs = [(first / name, second / name) for name in sorted(both)]
    return [pair for pair in pairs if len({path.read_bytes() for path in pair}) == 1]


def test_parts_with_equal_statistics_share_their_files_in_a_copy_on_a_disk(
    cache, bucket, tmp_path, monkeypatch
):
    assert shared_statistics(cache)
    copy(cache, bucket)
    for number, source in enumerate((cache, bucket)):
        target = tmp_path / f"copy-{number}"
        there = copy(source, target)
        assert files_of(target) == files_of(cache)
        assert all(first.samefile(second) for first, second in shared_statistics(target))
        written = {path.stat().st_ino: path.stat().st_size for path in files_in(target)}
        assert there.bytes_sent == sum(written.values())
    first, second = shared_statistics(target)[0]
    first.write_bytes(b"damaged")  # and so the other one, which is the same file
    assert copy(source, target).sent == 2
    assert files_of(target) == files_of(cache)
    assert first.samefile(second)

    def without_links(old, new):
        if "statistics" in str(new):
            raise PermissionError(errno.EPERM, "no links here")
        make_link(old, new)

    make_link = os.link
    monkeypatch.setattr(os, "link", without_links)
    copy(source, tmp_path / "without-links")
    assert files_of(tmp_path / "without-links") == files_of(cache)
    assert not any(a.samefile(b) for a, b in shared_statistics(tmp_path / "without-links"))


def files_in(cache: Path) -> list[Path]:
    return [p for p in cache.rglob("*") if p.is_file() and not p.name.endswith(".lock")]


DYING = """
import os, signal, sys, threading
from decant.pipelines.upkeep.copy import copy
from decant.store.base import Store
from decant.store.objects import ObjectStore
from decant.store.posix import PosixStore
left, counting = int(sys.argv[3]), threading.Lock()
def dying(write):
    def until(*arguments):
        global left
        with counting:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments)
    return until
kind = ObjectStore if "://" in sys.argv[2] else PosixStore
kind.put, kind.create = dying(kind.put), dying(kind.create)
if kind is PosixStore:
    kind.link = dying(kind.link)
copy(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("left", [1, 20, -1])
@pytest.mark.parametrize("place", ["bucket", "directory"])
def test_killed_in_the_middle_it_is_no_cache_and_the_next_run_sends_the_rest(
    cache, bucket, tmp_path, place, left
):
    before = files_of(cache)
    target = bucket if place == "bucket" else str(tmp_path / "target")
    # A bucket is first written to by the two writes of the probe, and the tokenizer's names after
    # the claims. There one object serves files of one content.
    fewer = repeated(cache) if place == "bucket" else 0
    writes = (left if left > 0 else len(before) - 1 - fewer) + (3 if place == "bucket" else 0)
    command = [sys.executable, "-c", DYING, str(cache), target, str(writes)]
    assert subprocess.run(command, env=environment()).returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match=r"not sealed|not a sealed cache"):
        copy(target, tmp_path / "elsewhere")
    rest = copy(cache, target)
    # The writes that were begun, but for the others that were under way: four at a time.
    there = len(before) - rest.sent
    off = fewer + (place == "bucket")
    assert -off <= min(left % len(before), len(before) - 1) - there < 4 + off
    copy(target, tmp_path / "back")
    assert files_of(tmp_path / "back") == before


def test_a_damaged_file_is_named_and_never_copied_and_one_at_the_target_is_mended(
    cache, bucket, tmp_path
):
    copy(cache, bucket)
    file = cache / "parts/0000/rows/unit-00000.array_record"
    key = file.relative_to(cache).as_posix()
    right = file.read_bytes()
    wrong = right[:-1] + bytes([right[-1] ^ 1])
    named = f"objects/{hashlib.sha256(right).hexdigest()}.array_record"
    open_store(bucket).put(named, wrong)
    with pytest.raises(OSError, match=rf"{named}: has other bytes"):
        copy(bucket, tmp_path / "back")
    assert not (tmp_path / "back/manifest.json").exists()
    assert copy(cache, bucket).sent == 1
    assert open_store(bucket).get(named) == right
    file.write_bytes(wrong)
    with pytest.raises(ValueError, match=rf"{key}: has other bytes.*decant verify {cache}"):
        copy(cache, tmp_path / "target")
    file.unlink()
    with pytest.raises(ValueError, match=rf"{key}.*decant verify {cache}"):
        copy(cache, tmp_path / "target")
    assert not (tmp_path / "target/manifest.json").exists()


def test_a_copy_that_fails_leaves_no_thread_though_its_error_is_held(cache, tmp_path):
    """What waits for threads must not be left to the garbage collector: it may run in any thread,
    also in one that is about to begin and holds the lock of all beginnings."""
    (cache / "parts/0000/rows/unit-00000.array_record").unlink()
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="decant verify") as held:
        copy(cache, tmp_path / "target")
    assert held.tb, "and with it the frames of the copy"
    assert set(threading.enumerate()) <= before


def test_a_commit_that_was_not_sealed_is_refused(cache, tmp_path):
    commits = cache / "parts/0000/commits"
    shutil.copy(commits / "logits-unit-00001.json", commits / "logits-unit-00000.json")
    with pytest.raises(ValueError, match=r"unit-00000\.json: not the commit of logits"):
        copy(cache, tmp_path / "target")


def test_an_older_state_is_brought_up_to_date_and_another_cache_is_left_alone(
    cache, bucket, tmp_path
):
    shutil.copytree(cache, tmp_path / "older")
    manifest = read_manifest(cache)
    first = dataclasses.replace(manifest, parts=manifest.parts[:1])
    write_manifest(tmp_path / "older", first, replaces=manifest.cache_id)
    sent = copy(tmp_path / "older", bucket).sent
    grown = copy(cache, bucket)
    assert 1 < grown.sent <= grown.files - sent + 1, "what the second part has, and the manifest"
    with pytest.raises(ValueError, match=r"holds another cache.* Choose another place"):
        copy(tmp_path / "older", bucket)
    remove_signals(cache, ["attention/1"])
    assert copy(cache, bucket).sent == 1
    copy(bucket, tmp_path / "back")
    assert open_cache(tmp_path / "back").manifest == read_manifest(cache)


def test_an_unfinished_capture_at_the_target_is_left_alone(cache, tmp_path):
    request = tmp_path / "target/parts/0000/request.json"
    request.parent.mkdir(parents=True)
    request.write_text("another capture's")
    with pytest.raises(ValueError, match="belongs to another capture, which has not finished"):
        copy(cache, tmp_path / "target")
    assert hashes(tmp_path / "target").keys() - {".seal.lock"} == {"parts/0000/request.json"}


def test_the_tokenizer_of_a_cache_without_its_hashes_is_copied_too(cache, bucket, tmp_path):
    manifest = read_manifest(cache)
    old = dataclasses.replace(manifest, tokenizer_files={})
    write_manifest(cache, old, replaces=manifest.cache_id)
    copy(cache, bucket)
    copy(bucket, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(cache)


def test_names_of_a_bucket_on_a_disk_and_of_a_disk_in_a_bucket_are_told_from_each_other(
    cache, bucket, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("DECANT_MIRROR", str(tmp_path / "mirror"))
    copy(cache, bucket)
    for key, _ in (store := open_store(bucket)).list():
        (tmp_path / "raw" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / key).write_bytes(store.get(key))
    with pytest.raises(ValueError, match=r"raw: its files are named as in a bucket. `decant copy`"):
        open_cache(tmp_path / "raw")
    copy(tmp_path / "raw", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(cache)
    old = upload(cache, f"{bucket}-old")
    assert open_cache(old).manifest == open_cache(bucket).manifest
    assert main(["forget", old, "--source=x"]) == 1
    told = capsys.readouterr().err
    assert f"{old}: a release before 0.12 copied this cache there" in told
    assert copy(cache, old).sent > 1
    assert main(["forget", old, "--source=x"]) == 1
    assert "no source is called x" in capsys.readouterr().err


def test_what_cannot_be_copied_is_refused_with_the_reason(cache, bucket, tmp_path):
    merge(tmp_path / "merged", [cache])
    with pytest.raises(ValueError, match=r"a merged cache, whose part .* Copy the caches"):
        copy(tmp_path / "merged", bucket)
    for target in (cache, cache / "inside", tmp_path):
        with pytest.raises(ValueError, match="name another directory"):
            copy(cache, target)
    with pytest.raises(ValueError, match=f"{bucket}/none: not a sealed cache"):
        copy(f"{bucket}/none", tmp_path / "x")
    with pytest.raises(ValueError, match="no such cache directory"):
        copy(tmp_path / "none", bucket)
    with pytest.raises(ValueError, match="supported: a local path, s3://, gs://"):
        copy(cache, "ftp://host/cache")


def test_a_link_in_the_target_is_not_followed(cache, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "target/parts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link"):
        copy(cache, tmp_path / "target")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.slow
def test_spoiled_on_the_way_the_copy_has_the_same_bytes(
    cache, bucket, tmp_path, s3_server, monkeypatch
):
    proxy = FaultProxy(s3_server.endpoint, share=0.15)
    with proxy.serving() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        copy(cache, bucket)
        copy(bucket, tmp_path / "back")
    assert proxy.done.total() > 10
    assert files_of(tmp_path / "back") == files_of(cache)


def test_the_command_says_what_it_sent(cache, bucket, tmp_path, capsys, monkeypatch):
    assert main(["copy", str(cache), bucket, "--quiet"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"copied {cache} to {bucket}: ")
    assert main(["copy", bucket, str(tmp_path / "back"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["source"], document["files"]) == (bucket, len(files_of(cache)))
    assert main(["copy", "s3://", str(tmp_path / "back")]) == 1
    assert "'' cannot be the name of a bucket" in capsys.readouterr().err
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert main(["copy", bucket, str(tmp_path / "back")]) == 1
    error = capsys.readouterr().err
    assert "error: " in error
    assert "the credentials are wrong. Check AWS_ACCESS_KEY_ID" in error
