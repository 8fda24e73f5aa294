"""Checkpoints in a bucket: the model of a local copy, of which only what is needed is read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from decant.models import open_checkpoint
from decant.models.parameters import parameters_by_path
from decant.pipelines.teacher.identity import teacher_id_of
from decant.store import ChangedError, open_store
from tests.making.models import CONFIG, final_states, hf_tensors, write_gguf, write_hf
from tests.models.checkpoints.test_peft import QUERY, matrices, write_adapter
from tests.models.families.test_families import GOLDEN


def upload(folder: Path, url: str) -> str:
    """Copy the folder below the address; returns the address of the copy."""
    for path in folder.rglob("*"):
        if path.is_file():
            open_store(url).put(f"{folder.name}/{path.relative_to(folder)}", path.read_bytes())
    return f"{url}/{folder.name}"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in two files, with an index and a template in a folder of its own."""
    tensors = hf_tensors()
    folder = write_hf(tmp_path / "teacher", tensors)
    home = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(tensors)}
    for file in set(home.values()):
        save_file({n: t for n, t in tensors.items() if home[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("a template")
    return folder


def identity(name, memory: Path) -> str:
    checkpoint = open_checkpoint(name)
    return teacher_id_of(
        checkpoint, dtype="float32", quantize="none", vocabulary=100, memory=memory
    )


def test_the_model_and_its_ids_are_those_of_a_local_copy(folder, bucket, tmp_path, sent):
    url = upload(folder, bucket)
    here, there = open_checkpoint(folder), open_checkpoint(url)
    assert there.config == here.config == CONFIG
    assert there.title == here.title == "teacher"
    assert there.name == url
    np.testing.assert_array_equal(final_states(there.load()), final_states(here.load()))
    ids = [identity(place, tmp_path / "digests") for place in (folder, url)]
    assert ids[0] == ids[1]
    sent.clear()
    assert identity(url, tmp_path / "digests") == ids[0]
    assert not [name for name in sent if name.endswith(".safetensors")]


def test_an_adapter_in_a_bucket_is_that_of_a_local_copy(folder, bucket, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", matrices({QUERY: 4}), base=folder)
    places = (adapter, upload(adapter, bucket))
    here, there = (open_checkpoint(place).load() for place in places)
    np.testing.assert_array_equal(final_states(there), final_states(here))
    ids = [identity(place, tmp_path / "digests") for place in (*places, folder)]
    assert ids[0] == ids[1] != ids[2]


def test_a_gguf_file_is_read_by_range_and_is_the_model_of_a_local_copy(
    bucket, tmp_path, sent, monkeypatch
):
    monkeypatch.setattr("decant.models.checkpoints.gguf_header._FIRST", 100)
    file = write_gguf(tmp_path / "m.gguf", hf_tensors(), kind=gguf.GGMLQuantizationType.Q8_0)
    url = f"{bucket}/models/m.gguf"
    open_store(bucket).put("models/m.gguf", file.read_bytes())
    here, there = open_checkpoint(file), open_checkpoint(url)
    assert (there.name, there.title, there.config) == (url, "m.gguf", here.config)
    assert there.tokenizer().digest == here.tokenizer().digest
    np.testing.assert_array_equal(final_states(there.load()), final_states(here.load()))
    ids = [identity(place, tmp_path / "digests") for place in (file, url)]
    assert ids[0] == ids[1]
    sent.clear()
    whole = here.files.read("blk.0.ffn_up.weight")
    share = there.files.read("blk.0.ffn_up.weight", (slice(16, 32), slice(8, 24)))
    np.testing.assert_array_equal(share, whole[16:32, 8:24])
    assert sent == {"m.gguf": [16 * 34]}, "16 rows of one block of 34 bytes"
    open_store(bucket).put("models/m.gguf", b"GGUF" + bytes(80))
    with pytest.raises(ChangedError, match=r"m\.gguf: changed"):
        there.files.read("blk.0.ffn_up.weight")
    with pytest.raises(ValueError, match=r"models/m\.gguf: not a readable GGUF file: its version"):
        _ = open_checkpoint(url).config


@pytest.mark.parametrize("family", ["gemma2", "llama3"])
def test_a_share_reads_its_rows_only(family, bucket, tmp_path, sent):
    folder = Path(shutil.copytree(GOLDEN / family, tmp_path / family))
    url = upload(folder, bucket)
    whole = load_file(folder / "model.safetensors")
    files = open_checkpoint(url).files
    assert files.shapes == {name: tensor.shape for name, tensor in whole.items()}
    for name, tensor in whole.items():
        sent.clear()
        rows = slice(len(tensor) // 4, len(tensor) // 2)
        index = (rows, *(slice(0, n) for n in tensor.shape[1:]))
        part = files.read(name, index)
        assert part.dtype == tensor.dtype
        np.testing.assert_array_equal(part, tensor[index])
        assert sent == {"model.safetensors": [part.nbytes]}
        columns = (*(slice(0, n) for n in tensor.shape[:-1]), slice(1, 3))
        np.testing.assert_array_equal(files.read(name, columns), tensor[columns])
        np.testing.assert_array_equal(files.read(name), tensor)


SCRIPT = """
import sys, jax, numpy as np
from decant.models import open_checkpoint
from decant.models.mesh.sharding import teacher_mesh
from decant.models.parameters import parameters_by_path
from decant.store.objects import ObjectStore
read, get = [], ObjectStore.get
def counting(self, key, **kwargs):
    data = get(self, key, **kwargs)
    read.append(len(data) if key.endswith(".safetensors") else 0)
    return data
ObjectStore.get = counting
here, there = sys.argv[1:]
mesh = teacher_mesh(data=1, tensor=4, expert=1)
alone = {p: np.asarray(v.get_value()) for p, v in
         parameters_by_path(open_checkpoint(here).load()).items()}
for path, parameter in parameters_by_path(open_checkpoint(there).load(mesh=mesh)).items():
    np.testing.assert_array_equal(np.asarray(parameter.get_value()), alone[path], err_msg=path)
print(sum(read))
"""


def test_a_mesh_of_shares_reads_a_tensor_once_unless_its_rows_are_split(bucket, tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "llama3", tmp_path / "llama3"))
    url = upload(folder, bucket)
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "NPROC": "32",  # fewer threads than devices deadlock in a collective
        "PYTHONPATH": str(Path.cwd()),
    }
    command = [sys.executable, "-c", SCRIPT, str(folder), url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    rows = ("down_proj.weight", "o_proj.weight")  # their inputs are split among the devices
    again = sum(t.nbytes for name, t in load_file(weights).items() if name.endswith(rows))
    assert int(done.stdout) == size + 3 * again


def test_a_file_that_changes_while_it_is_read_is_an_error_by_its_name(folder, bucket):
    url = upload(folder, bucket)
    checkpoint = open_checkpoint(url)
    name = next(iter(checkpoint.files.shapes))
    for file in checkpoint.files.weight_files:
        open_store(url).put(file, (folder / file).read_bytes() + b" ")
    with pytest.raises(ChangedError, match=r"model-0000\d-of-00002.safetensors: changed"):
        checkpoint.files.read(name)


def test_a_damaged_header_is_named(tmp_path, bucket):
    folder = write_hf(tmp_path / "teacher", hf_tensors())
    url, data = upload(folder, bucket), (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    for damaged in (
        *(b"", data[:4], data[:100], data[:-1], data + b"x"),
        (1 << 40).to_bytes(8, "little") + data[8:],
        data[:8] + b"[" + data[9:],
        data[:8] + header.replace(b'"shape":[', b'"shape":[9,', 1)[:length] + data[8 + length :],
        data[:8] + header.replace(b"F32", b"F64", 1) + data[8 + length :],
    ):
        open_store(url).put("model.safetensors", damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors: weights cannot be read"):
            open_checkpoint(url).load()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("s3://no-such-bucket/teacher", "there is no such bucket"),
        ("{bucket}/none", "none: nothing is there. Expected the files of a Hugging Face model"),
        ("{bucket}/other", "other: no config.json here"),
        ("{bucket}/model.gguf", r"model\.gguf: no such file"),
        ("ftp://host/teacher", "'ftp://' is not supported here; supported: a local path, s3://"),
    ],
)
def test_what_cannot_be_opened_is_named_in_one_message(bucket, name, error):
    open_store(bucket).put("other/readme.txt", b"no model")
    with pytest.raises((ValueError, OSError), match=error):
        open_checkpoint(name.format(bucket=bucket))


def test_nothing_is_fetched_that_only_a_cache_asks_for(folder, bucket, sent):
    with pytest.raises(FileNotFoundError, match="lies in a bucket"):
        open_checkpoint(upload(folder, bucket), fetch=False)
    assert not sent


def test_the_parameters_of_bfloat16_are_those_of_a_local_copy(bucket, tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "gemma2", tmp_path / "gemma2"))
    here = parameters_by_path(open_checkpoint(folder).load())
    there = parameters_by_path(open_checkpoint(upload(folder, bucket)).load())
    for path, parameter in here.items():
        np.testing.assert_array_equal(there[path].get_value(), parameter.get_value())
