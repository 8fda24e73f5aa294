"""Corpora in datasets of the hub: the real client against a local server, online and offline."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from decant.pipelines.capture.remote_corpus import kept_remote, pinned_corpus
from decant.pipelines.config import Corpus, SourceGroup
from decant.pipelines.rows.hub_address import HubAddress
from decant.schemas.disk.layout import part_layout
from decant.schemas.manifest.request import Remote, claim
from tests.making.caches import tiny_settings
from tests.making.hub_server import Hub
from tests.models.checkpoints.test_hub import environment

READ = """
import json, sys
from pathlib import Path
from decant.pipelines.capture.remote_corpus import pinned_corpus
from decant.pipelines.config import Corpus
from decant.pipelines.rows.documents import read_documents, with_kinds
from decant.pipelines.rows.sources import cut_shards, find_sources
memory, kept, *patterns = sys.argv[1:]
answers = []
for pattern in patterns:
    told = []
    try:
        asked, pins = pinned_corpus(Corpus(files=(pattern,)), json.loads(kept), tell=told.append)
        sources = find_sources(
            asked.files, max_bytes=None, memory=Path(memory), tell=told.append
        )
        sources = with_kinds(sources, text_field="text")
        documents = [
            document.content
            for shard in cut_shards(sources, shard_bytes=1 << 20)
            for document in read_documents(shard, sources, text_field="text", refuse=print)
        ]
        answers.append({
            "pins": pins, "told": told,
            "sources": [(s.name, s.sha256, s.bytes, s.kind) for s in sources],
            "documents": documents,
        })
    except (ValueError, OSError, RuntimeError) as error:
        answers.append({"error": f"{type(error).__name__}: {error}"})
print(json.dumps(answers))
"""
DATASET = "hf://datasets/owner/texts"
REPO = "datasets/owner/texts"


def read(*patterns: str, env: dict[str, str], kept: dict[str, str] | None = None) -> list[dict]:
    memory = f"{env['HF_HOME']}.digests"
    command = [sys.executable, "-c", READ, memory, json.dumps(kept or {}), *patterns]
    out = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return json.loads(out.stdout)


def write_files(folder: Path, *, note: str = "") -> dict[str, bytes]:
    """The files of a dataset, which also lie in `folder`."""
    (folder / "data").mkdir(parents=True)
    texts = [f"text {n} of the dataset{note}" for n in range(300)]
    junk = [bytes(1 << 18)] * 100
    table = pyarrow.table({"text": texts[:100], "junk": junk})
    pyarrow.parquet.write_table(
        table, folder / "data" / "a.parquet", compression="none", use_dictionary=False
    )
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[100:200])
    (folder / "data" / "b.jsonl").write_text(lines)
    (folder / "data" / "c.txt").write_text("\n".join(texts[200:]))
    (folder / "README.md").write_text("a dataset")
    (folder / ".gitattributes").write_text("hidden")
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def hub():
    return Hub()


def test_addresses_are_told_from_what_they_are_not():
    def parts(url: str) -> tuple:
        address = HubAddress.parse(url)
        return address.repo, address.revision, address.path

    commit = "ab" * 20
    assert parts("hf://datasets/o/n") == ("o/n", None, "")
    assert parts("hf://datasets/o/n/a/*.txt") == ("o/n", None, "a/*.txt")
    assert parts("hf://datasets/o/n@v1/a@b") == ("o/n", "v1", "a@b")
    assert parts("hf://datasets/o/n@a%2Fb/x") == ("o/n", "a/b", "x")
    assert parts("hf://datasets/o/n@refs/convert/parquet/x/0.parquet") == (
        "o/n", "refs/convert/parquet", "x/0.parquet"
    )  # fmt: skip
    for url in ("hf://datasets/o/n", "hf://datasets/o/n@a%2Fb/x", f"hf://datasets/o/n@{commit}/x"):
        assert str(HubAddress.parse(url)) == url
    assert HubAddress.parse(f"hf://datasets/o/n@{commit}").is_pinned
    for url in (
        *("hf://o/n", "hf://datasets/o", "hf://models/o/n", "hf://datasets/o/n@"),
        *("hf://datasets/o/n/../x", "hf://datasets/o/n@../x", "hf://datasets/o/n@a%2F..%2Fb/x"),
    ):
        with pytest.raises(ValueError, match="expected hf://datasets/owner/name/PATH"):
            HubAddress.parse(url)


def test_rows_are_those_of_a_local_copy_and_only_what_is_needed_is_fetched(hub, tmp_path):
    files = write_files(tmp_path / "copy")
    commit = hub.push(REPO, files)
    with hub.serving() as address:
        env = environment(tmp_path / "home", address)
        patterns = ("data/*", "data/a.parquet", "data", "**/*.jsonl", "")
        there = read(*(f"{DATASET}/{pattern}" for pattern in patterns), env=env)
        here = read(*(f"{tmp_path}/copy/{pattern}" for pattern in patterns), env=env)
        for one, other in zip(there, here, strict=True):
            assert one["pins"] == {DATASET: commit}
            assert one | {"pins": {}, "told": []} == other | {"told": []}, one["told"]
        whole = len(files["data/a.parquet"])
        # Whole blocks are kept: the one of the column of text, and the last one, with the footer.
        assert hub.sent["data/a.parquet"] <= 2 * (8 << 20) < whole
        # Large files are never read to hash them; of small ones that was the only time.
        assert hub.sent["data/c.txt"] == len(files["data/c.txt"])
    env |= {"HF_HUB_OFFLINE": "1"}
    offline = read(f"{DATASET}/data/*", f"{DATASET}@v2/data/*", env=env)
    assert offline[0] == there[0] | {"told": []}
    assert "the hub cannot be reached" in offline[1]["error"]


def test_a_commit_that_is_kept_is_read_though_the_branch_has_moved(hub, tmp_path):
    commit = hub.push(REPO, write_files(tmp_path / "first"))
    hub.push(REPO, write_files(tmp_path / "second", note=" again"))
    with hub.serving() as address:
        env = environment(tmp_path / "home", address)
        kept, moved = (
            read(f"{DATASET}/data/*.jsonl", env=env, kept=pins)[0]
            for pins in ({DATASET: commit}, {})
        )
    assert kept["documents"] == [f"text {n} of the dataset" for n in range(100, 200)]
    assert kept["told"][0] == f"{DATASET}: read at commit {commit[:12]}, as by the first run"
    assert moved["documents"] == [f"text {n} of the dataset again" for n in range(100, 200)]


def test_files_that_hugging_faces_tools_have_fetched_are_used_offline(hub, tmp_path):
    commit = hub.push(REPO, write_files(tmp_path / "copy"))
    fetch = "from huggingface_hub import snapshot_download as get; get({!r}, repo_type='dataset')"
    with hub.serving() as address:
        env = environment(tmp_path / "home", address)
        subprocess.run([sys.executable, "-c", fetch.format("owner/texts")], env=env, check=True)
    env |= {"HF_HUB_OFFLINE": "1"}
    (there,) = read(f"{DATASET}/data/*", env=env)
    (here,) = read(f"{tmp_path}/copy/data/*", env=env)
    assert (there["sources"], there["documents"]) == (here["sources"], here["documents"])
    assert there["pins"] == {DATASET: commit}


def test_errors_of_the_hub_are_one_message_each(hub, tmp_path):
    hub.push(REPO, {"a.txt": b"text"})
    hub.push("datasets/owner/gated", {"a.txt": b"text"})
    hub.gated.add("datasets/owner/gated")
    with hub.serving() as address:
        env = environment(tmp_path / "home", address)
        names = ("texts@v9/a.txt", "none/a.txt", "gated/a.txt", "texts/b.txt", "texts/b/*.txt")
        answers = read(*(f"hf://datasets/owner/{name}" for name in names), env=env)
    errors = [answer["error"] for answer in answers]
    assert "texts@v9/a.txt: no branch, tag or commit of this name" in errors[0]
    assert "none/a.txt: no dataset of this name on the hub that you can see" in errors[1]
    assert "this dataset is gated: accept its terms" in errors[2]
    assert "matches no file" in errors[3]
    assert "matches no file" in errors[4]
    assert all("\n" not in error for error in errors)


def test_the_first_commit_and_all_hashes_stand_in_the_requests_of_the_parts(tmp_path):
    def begin(number: int, remote: Remote | None) -> None:
        path = part_layout(tmp_path, number).request
        claim(path, {}, sources=[], settings={}, cache=tmp_path, remote=remote)

    assert not kept_remote(tmp_path)
    begin(0, None)  # as of a local corpus, or of an older release
    assert "remote" not in json.loads(part_layout(tmp_path, 0).request.read_text())
    begin(1, Remote({DATASET: "a" * 40}, {"s3://b/x 1 2": "x"}))
    begin(2, Remote({DATASET: "b" * 40, f"{DATASET}@v2": "c" * 40}, {"s3://b/y 1 2": "y"}))
    kept = kept_remote(tmp_path)
    assert kept.revisions == {DATASET: "a" * 40, f"{DATASET}@v2": "c" * 40}
    assert kept.digests == {"s3://b/x 1 2": "x", "s3://b/y 1 2": "y"}
    groups = (SourceGroup(files=(f"{DATASET}/*", "here/*")), SourceGroup(files=("s3://b/*",)))
    corpus, revisions = pinned_corpus(Corpus(sources=groups), kept.revisions)
    assert corpus.sources[0].files == (f"{DATASET}@{'a' * 40}/*", "here/*")
    assert corpus.sources[1].files == ("s3://b/*",)
    assert revisions == {DATASET: "a" * 40}


def precompute(root: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    command = [
        *(sys.executable, "-m", "decant.pipelines", "precompute", f"--output={root}/cache"),
        *(f"--corpus.files={DATASET}/data/*.jsonl", f"--teacher.model={root}/teacher"),
        *("--corpus.sequence-length=64", "--corpus.heldout=0.2", "--signals.logits.k=8"),
        *("--signals.logits.draws=0", "--signals.logits.sketch.rank=0"),
    ]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_a_resumed_capture_reads_the_commit_of_the_first_run(hub, tmp_path):
    tiny_settings(tmp_path)
    commit = hub.push(REPO, write_files(tmp_path / "first"))
    with hub.serving() as address:
        env = environment(tmp_path / "home", address, XDG_CACHE_HOME=str(tmp_path / "digests"))
        first = precompute(tmp_path, env)
        assert first.returncode == 0, first.stderr
        part = tmp_path / "cache" / "parts" / "0000"
        kept = json.loads((part / "request.json").read_text())["remote"]
        assert kept["revisions"] == {DATASET: commit}
        hub.push(REPO, write_files(tmp_path / "second", note=" again"))
        manifest = (tmp_path / "cache" / "manifest.json").read_bytes()
        # As if the capture had been killed before its last unit, and went on elsewhere.
        (tmp_path / "cache" / "manifest.json").unlink()
        max((part / "commits").iterdir()).unlink()
        shutil.rmtree(tmp_path / "home")
        again = precompute(tmp_path, env)
        assert again.returncode == 0, again.stderr
        assert f"read at commit {commit[:12]}, as by the first run" in again.stderr
    assert (tmp_path / "cache" / "manifest.json").read_bytes() == manifest
