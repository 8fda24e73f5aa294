"""Checkpoints by hub id: the real client against a local server, online and offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from decant.models import open_checkpoint
from decant.models.checkpoints.hub import HubId, without_commit
from tests.making.caches import write_teacher
from tests.making.hub_server import Hub
from tests.making.models import hf_tensors, write_gguf, write_hf
from tests.models.checkpoints.test_peft import QUERY, matrices, write_adapter

OPEN = """
import json, sys
from decant.models import open_checkpoint
answers = []
for name in sys.argv[1:]:
    try:
        checkpoint = open_checkpoint(name)
        shapes = {n: list(s) for n, s in checkpoint.files.shapes.items()}
        answers.append({"name": checkpoint.name, "title": checkpoint.title,
                        "path": str(checkpoint.path), "shapes": shapes})
    except (ValueError, OSError) as error:
        answers.append({"error": f"{type(error).__name__}: {error}"})
print(json.dumps(answers))
"""


def environment(home: Path, address: str, **others: str) -> dict[str, str]:
    """Variables for a process that uses the local hub.

    huggingface_hub reads them when it is imported, so tests run it in processes of their own.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return {
        **inherited,
        "HF_HOME": str(home),
        "HF_ENDPOINT": address,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
        **others,
    }


def open_in_process(*names: str, cwd: Path, env: dict[str, str], script: str = OPEN) -> list[dict]:
    command = [sys.executable, "-c", script, *names]
    out = subprocess.run(command, cwd=cwd, env=env, check=True, capture_output=True, text=True)
    return json.loads(out.stdout)


@pytest.fixture
def hub():
    return Hub()


def test_hub_ids_are_told_from_paths():
    assert HubId.parse("owner/name") == HubId("owner/name")
    assert HubId.parse("owner/name@refs/pr/1") == HubId("owner/name", None, "refs/pr/1")
    assert HubId.parse("o/n/sub/x.gguf@v1") == HubId("o/n", "sub/x.gguf", "v1")
    for path in ("/o/n", "./o/n", "../o", "name", "o/n/sub", "o/n@", "o//n", "~/n", "o/n.gguf/"):
        assert HubId.parse(path) is None, path
    for path in ("o/n/../../x.gguf", "o/n/./x.gguf", "o/n@../../x", "o/n@..", "o/n@a/../../b"):
        assert HubId.parse(path) is None, path
    assert without_commit(f"o/n/x.gguf@{'ab' * 20}") == "o/n/x.gguf"
    assert without_commit("o/n@main") is None
    assert without_commit("o/n") is None


def test_only_needed_files_are_fetched_once_and_the_name_has_the_commit(hub, tmp_path):
    write_teacher(tmp_path / "teacher")
    others = {"pytorch_model.bin": b"x", "consolidated.safetensors": b"x", "README.md": b"x"}
    others["additional_chat_templates/tool_use.jinja"] = b"x"
    commit = hub.push_directory("owner/model", tmp_path / "teacher", **others)
    with hub.serving() as address:
        env = environment(tmp_path / "home", address)
        (first,) = open_in_process("owner/model", cwd=tmp_path, env=env)
        assert (first["name"], first["title"]) == (f"owner/model@{commit}", "owner/model")
        wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
        wanted.add("additional_chat_templates/tool_use.jinja")
        assert sorted(hub.fetched) == sorted(wanted)
        # The branch moves. Offline, and by commit, the same files are opened.
        moved = hub.push("owner/model", hub.files["owner/model"][commit] | {"new.txt": b"n"})
        offline = env | {"HF_HUB_OFFLINE": "1"}
        again, other = open_in_process("owner/model", "owner/other", cwd=tmp_path, env=offline)
        assert again == first
        assert_not_fetched(other["error"])
        now, then = open_in_process("owner/model", first["name"], cwd=tmp_path, env=env)
        assert (now["name"], then) == (f"owner/model@{moved}", first)
    # The server is down.
    names = ("owner/model", first["name"], "owner/other")
    *again, other = open_in_process(*names, cwd=tmp_path, env=env)
    assert again == [now, first]
    assert_not_fetched(other["error"])


def test_without_leave_nothing_is_asked_of_the_hub(hub, tmp_path):
    write_teacher(tmp_path / "teacher")
    hub.push_directory("owner/model", tmp_path / "teacher")
    without = OPEN.replace("open_checkpoint(name)", "open_checkpoint(name, fetch=False)")
    with hub.serving() as address:
        env = environment(tmp_path / "home", address)
        (refused,) = open_in_process("owner/model", cwd=tmp_path, env=env, script=without)
        assert refused == {"error": "FileNotFoundError: owner/model: not fetched before."}
        assert hub.fetched == []
        fetched = open_in_process("owner/model", cwd=tmp_path, env=env)
    assert open_in_process("owner/model", cwd=tmp_path, env=env, script=without) == fetched


def test_an_adapter_of_the_hub_brings_its_base(hub, tmp_path):
    write_hf(tmp_path / "base", hf_tensors())
    adapter = write_adapter(tmp_path / "adapter", matrices({QUERY: 4}), base="owner/base")
    hub.push_directory("owner/base", tmp_path / "base")
    commit = hub.push_directory("owner/adapter", adapter, **{"optimizer.pt": b"x"})
    with hub.serving() as address:
        env = environment(tmp_path / "home", address)
        (opened,) = open_in_process("owner/adapter", cwd=tmp_path, env=env)
    assert opened["name"] == f"owner/adapter@{commit}"
    assert opened["shapes"].keys() == hf_tensors().keys()
    wanted = ["adapter_config.json", "adapter_model.safetensors", "config.json"]
    assert sorted(hub.fetched) == [*wanted, "model.safetensors"]
    assert open_in_process("owner/adapter", cwd=tmp_path, env=env | {"HF_HUB_OFFLINE": "1"})


def assert_not_fetched(error: str) -> None:
    assert error.startswith("FileNotFoundError: owner/other: no directory of this name here")
    assert "HF_HUB_OFFLINE is set" in error
    assert "hf download owner/other" in error


def test_weights_in_several_files_are_those_that_the_index_names(hub, tmp_path):
    tensors = hf_tensors()
    source = write_hf(tmp_path / "whole", tensors)
    names = sorted(tensors)
    halves = {"a-00001.safetensors": names[:9], "b-00002.safetensors": names[9:]}
    for file, tensor_names in halves.items():
        save_file({name: tensors[name] for name in tensor_names}, tmp_path / file)
    index = {
        "weight_map": {name: file for file, tensor_names in halves.items() for name in tensor_names}
    }
    files = {file: (tmp_path / file).read_bytes() for file in halves} | {
        "config.json": (source / "config.json").read_bytes(),
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "other.safetensors": b"x",
    }
    hub.push("owner/model", files)
    with hub.serving() as address:
        env = environment(tmp_path / "home", address)
        (answer,) = open_in_process("owner/model", cwd=tmp_path, env=env)
    assert answer["shapes"] == {name: list(array.shape) for name, array in tensors.items()}
    assert "other.safetensors" not in hub.fetched


def test_a_gguf_file_of_a_repository_is_fetched_alone(hub, tmp_path):
    data = write_gguf(tmp_path / "m.gguf", hf_tensors()).read_bytes()
    commit = hub.push("owner/model", {"sub/m-Q8.gguf": data, "sub/m-Q4.gguf": b"x"})
    with hub.serving() as address:
        env = environment(tmp_path / "home", address)
        answer, whole = open_in_process(
            "owner/model/sub/m-Q8.gguf", "owner/model", cwd=tmp_path, env=env
        )
    assert answer["name"] == f"owner/model/sub/m-Q8.gguf@{commit}"
    assert answer["title"] == "owner/model/sub/m-Q8.gguf"
    assert hub.fetched == ["sub/m-Q8.gguf"]
    assert "has no config.json. For a repository of .gguf files name one" in whole["error"]


def test_a_checkpoint_that_cannot_be_fetched_is_an_error_with_a_remedy(hub, tmp_path):
    hub.push("owner/model", {"config.json": b"{}", "tokenizer.json": b"{}"})
    hub.push("owner/gated", {})
    hub.gated.add("owner/gated")
    names = ("owner/none", "owner/gated", "owner/model@v9", "owner/model")
    with hub.serving() as address:
        env = environment(tmp_path / "home", address)
        errors = [answer["error"] for answer in open_in_process(*names, cwd=tmp_path, env=env)]
    assert errors[0].startswith("FileNotFoundError: owner/none: no directory of this name here")
    assert "none on the hub" in errors[0]
    assert "accept its terms" in errors[1]
    assert errors[2] == "FileNotFoundError: owner/model has no branch, tag or commit 'v9'"
    assert "lacks model.safetensors: the repository holds no .safetensors" in errors[3]


def test_a_local_directory_takes_precedence_over_a_hub_id(tmp_path, monkeypatch):
    write_teacher(tmp_path / "owner" / "model")
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint("owner/model")
    assert (checkpoint.name, checkpoint.title) == ("owner/model", "model")
    assert load_file(checkpoint.path / "model.safetensors")
