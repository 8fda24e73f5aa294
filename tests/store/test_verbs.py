"""Every verb does the same in a directory, in memory and on a real S3 server."""

import hashlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from decant.store import StoreError, open_store
from decant.store.objects import ObjectStore
from decant.store.opening import require_conditions
from tests.paths import ROOT

KINDS = ("directory", "memory", "s3")


@pytest.fixture(params=KINDS)
def store(request, tmp_path):
    if request.param == "directory":
        return open_store(tmp_path / "store")
    if request.param == "memory":
        from obstore.store import MemoryStore

        return ObjectStore(MemoryStore(), url="memory://")
    return open_store(request.getfixturevalue("bucket"), writing=True)


def test_what_was_put_is_got_whole_and_by_range(store):
    store.put("a/b.bin", b"0123456789")
    assert store.get("a/b.bin") == b"0123456789"
    assert store.get("a/b.bin", start=3, length=4) == b"3456"
    assert store.get("a/b.bin", start=7) == b"789"
    assert store.get("a/b.bin", start=4, length=0) == b""
    assert store.head("a/b.bin").size == 10
    store.put("a/b.bin", b"")
    assert store.get("a/b.bin") == b""


def test_what_is_not_there_is_an_error_by_its_name_and_has_no_head(store):
    with pytest.raises(FileNotFoundError, match=r"a/none\.bin"):
        store.get("a/none.bin")
    with pytest.raises(FileNotFoundError, match=r"a/none\.bin"):
        store.get("a/none.bin", start=3, length=4)
    assert store.head("a/none.bin") is None
    store.delete("a/none.bin")


def test_fewer_or_other_bytes_than_were_asked_for_are_never_returned(store, hurried):
    store.put("a", b"0123")
    right = hashlib.sha256(b"0123").hexdigest()
    assert store.get("a", length=4, sha256=right) == b"0123"
    with pytest.raises(StoreError, match="got 2"):
        store.get("a", start=2, length=3)
    with pytest.raises(StoreError, match="sha256"):
        store.get("a", sha256="0" * 64)


def test_create_is_true_once_and_again_for_the_same_bytes(store):
    assert store.create("x/commit.json", b"mine")
    assert store.create("x/commit.json", b"mine")
    assert not store.create("x/commit.json", b"other")
    assert store.get("x/commit.json") == b"mine"


def test_swap_replaces_only_the_version_that_was_read(store):
    store.put("manifest.json", b"one")
    version = store.head("manifest.json").version
    assert store.swap("manifest.json", b"two", version)
    assert store.swap("manifest.json", b"two", version), "these bytes are there"
    assert not store.swap("manifest.json", b"three", version)
    assert store.get("manifest.json") == b"two"
    assert not store.swap("none.json", b"new", version)
    assert store.head("none.json") is None


def test_a_listing_has_keys_and_sizes_below_a_prefix_only(store):
    for key in ("rows/a", "rows/b/c", "rows-b", "top"):
        store.put(key, key.encode())
    assert sorted(store.list("rows")) == [("rows/a", 6), ("rows/b/c", 8)]
    assert sorted(key for key, _ in store.list()) == ["rows-b", "rows/a", "rows/b/c", "top"]
    assert list(store.list("none")) == []


def test_deleted_is_gone(store):
    store.put("a/b", b"x")
    store.delete("a/b")
    assert store.head("a/b") is None
    assert list(store.list()) == []


@pytest.mark.parametrize("key", ["a b+c/ü.txt", "x/%2F", "a/~t", "c*d?e#f&g=h", "0" * 200])
def test_odd_names_stay_as_they_are(store, key):
    store.put(key, key.encode())
    assert store.get(key) == key.encode()
    assert list(store.list()) == [(key, len(key.encode()))]


NO_KEYS = ["", "/a", "a/", "a//b", "../a", "a/./b", "a\\b", "a\nb", "k" * 901]


@pytest.mark.parametrize("key", NO_KEYS)
def test_what_leads_elsewhere_is_no_key(store, key):
    for verb in (store.get, store.head, store.delete):
        with pytest.raises(ValueError, match="key"):
            verb(key)
    with pytest.raises(ValueError, match="key"):
        store.put(key, b"")


@pytest.mark.parametrize("verb", ["create", "swap"])
def test_of_eight_who_write_at_once_one_wins(store, verb):
    for race in range(4):
        key = f"{verb}/{race}"
        write = store.create
        if verb == "swap":
            store.put(key, b"before")
            write = partial(store.swap, expected_version=store.head(key).version)
        together = threading.Barrier(8)

        def racer(number, key=key, write=write, together=together):
            together.wait()
            return write(key, str(number).encode())

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(racer, range(8)))
        assert sum(won) == 1
        assert store.get(key) == str(won.index(True)).encode()


RACER = """
import sys
from decant.store import open_store
store = open_store(sys.argv[1])
sys.stdin.readline()
print(*[int(store.create(f"race/{n}", sys.argv[2].encode())) for n in range(20)])
"""


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_of_four_processes_one_wins_each_race(kind, tmp_path, request):
    url = str(tmp_path) if kind == "directory" else request.getfixturevalue("bucket")
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, url, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=dict(os.environ),
            text=True,
        )
        for number in range(4)
    ]
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    results = [[int(word) for word in racer.communicate()[0].split()] for racer in racers]
    store = open_store(url)
    for race, won in enumerate(zip(*results, strict=True)):
        assert sum(won) == 1
        assert store.get(f"race/{race}") == str(won.index(1)).encode()


def test_a_directory_shows_no_file_that_is_being_written(tmp_path):
    store = open_store(tmp_path)
    store.create("a", b"x")
    store.swap("a", b"y", store.head("a").version)
    (tmp_path / ".a.1.2.tmp").write_bytes(b"half")
    assert list(store.list()) == [("a", 1)]


def test_a_link_below_a_directory_is_not_followed(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private/key").write_bytes(b"secret")
    store = open_store(tmp_path / "cache")
    store.put("a", b"")
    (tmp_path / "cache/parts").symlink_to(tmp_path / "private")
    (tmp_path / "cache/link").symlink_to(tmp_path / "private/key")
    for key in ("parts/key", "link"):
        for act in (store.get, store.head, store.delete, lambda key: store.put(key, b"")):
            with pytest.raises(ValueError, match="is a link, which is not followed"):
                act(key)
    assert (tmp_path / "private/key").read_bytes() == b"secret"


class Careless:
    """A client of a server that ignores conditions, as several S3 servers do."""

    def __init__(self, client):
        self.client = client

    def put(self, key, data, mode, **options):
        return self.client.put(key, data, mode="overwrite", **options)

    def __getattr__(self, name):
        return getattr(self.client, name)


class Falsified:
    """A client whose first answer to a write is lost, and whose first look back is falsified."""

    def __init__(self, client):
        self.client = client
        self.spoiled = []

    def put(self, key, data, **options):
        self.client.put(key, data, **options)
        if "put" not in self.spoiled:
            self.spoiled.append("put")
            raise ConnectionError("the answer is lost")

    def get_range(self, key, **options):
        data = bytes(self.client.get_range(key, **options))
        if "get" not in self.spoiled:
            self.spoiled.append("get")
            return data[:-1] + b"?"
        return data

    def __getattr__(self, name):
        return getattr(self.client, name)


def test_a_look_back_is_believed_when_two_agree():
    from obstore.store import MemoryStore

    client = Falsified(MemoryStore())
    assert ObjectStore(client, url="memory://").create("a", b"mine")
    assert client.spoiled == ["put", "get"]


def test_a_server_that_ignores_conditions_is_refused_and_the_probe_is_gone(bucket):
    store = open_store(bucket)
    careless = ObjectStore(Careless(store.client), url=bucket)
    with pytest.raises(StoreError, match=f"{bucket}: this server ignores conditions"):
        require_conditions(careless)
    assert list(store.list()) == []
