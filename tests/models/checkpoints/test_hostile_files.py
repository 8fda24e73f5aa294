"""Checkpoints from a stranger: counts, sizes, places and names that lie are refused at once."""

import json
import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from decant.models import open_checkpoint
from decant.models.checkpoints.file_bytes import LocalFile
from decant.models.checkpoints.gguf_file import GgufFile
from decant.models.checkpoints.gguf_header import read_header
from decant.models.checkpoints.hub import _weights
from tests.making.models import HF_CONFIG, hf_tensors, write_gguf, write_hf

# Numbers of GGUF's types of values.
U8, U32, STRING, ARRAY = 0, 4, 8, 9


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def field(name, kind, value):
    return string(name) + struct.pack("<I", kind) + value


def array(kind, count, data=b""):
    return struct.pack("<IQ", kind, count) + data


def tensor(name, dims, *, kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(*parts, fields=0, tensors=0, version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensors, fields) + b"".join(parts)


ONE = field("general.name", STRING, string("x"))
HOSTILE = {
    "an array of 2**62": (header(field("a", ARRAY, array(U8, 2**62)), fields=1), "at most"),
    "an array of 2**62 strings": (
        header(field("a", ARRAY, array(STRING, 2**62)), fields=1),
        "says 4,611,686,018,427,387,904; at most 2,097,152",
    ),
    "an array that the file lacks": (
        header(field("a", ARRAY, array(U32, 2**20)), fields=1),
        "goes on to byte",
    ),
    "an array of arrays": (header(field("a", ARRAY, array(ARRAY, 9)), fields=1), "of arrays"),
    "a string of 2**63": (header(struct.pack("<Q", 2**63), fields=1), "at most"),
    "a string beyond the file": (
        header(struct.pack("<Q", 999), fields=1),
        "goes on to byte",
    ),
    "a string that is not text": (header(string(b"\xff"), fields=1), "is not UTF-8"),
    "an array with a string that is not text": (
        header(field("a", ARRAY, array(STRING, 2, string("x") + string(b"\xff"))), fields=1),
        "is not UTF-8",
    ),
    "an array of strings that the file lacks": (
        header(field("a", ARRAY, array(STRING, 3, string("x") + string("y"))), fields=1),
        "goes on to byte",
    ),
    "an array with a string of 2**63": (
        header(field("a", ARRAY, array(STRING, 1, struct.pack("<Q", 2**63))), fields=1),
        "at most",
    ),
    "2**40 fields": (header(ONE, fields=2**40), "at most 65,536"),
    "more fields than there are": (header(ONE, fields=2), "goes on to byte"),
    "2**64 - 1 tensors": (header(ONE, fields=1, tensors=2**64 - 1), "at most 65,536"),
    "a field twice": (header(ONE, ONE, fields=2), "general.name is in it twice"),
    "an unknown type": (header(field("a", 99, b""), fields=1), "99 is not a valid"),
    "version 1": (header(version=1), "its version is 1; 2 and 3"),
    "big-endian": (header(version=3 << 24), "2 and 3, little-endian"),
    "another magic": (header(magic=b"GGML"), "does not begin with 'GGUF'"),
    "a tensor twice": (header(tensor("t", [0]), tensor("t", [0]), tensors=2), "t is in it twice"),
    "dims whose product overflows": (
        header(tensor("t", [2**32, 2**32, 2**32]), tensors=1),
        "tensor t ends at byte .* the file was cut short",
    ),
    "a tensor beyond the file": (header(tensor("t", [1], offset=2**63), tensors=1), "cut short"),
    "five axes": (header(tensor("t", [1] * 5), tensors=1), "has 5 axes"),
    "2**32 - 1 axes": (
        header(string("t"), struct.pack("<I", 2**32 - 1), tensors=1),
        "has 4294967295 axes",
    ),
    "an unknown quantisation": (header(tensor("t", [1], kind=250), tensors=1), "250 is not a"),
    "half a block": (header(tensor("t", [33], kind=8), tensors=1), "rows of 33"),
    "overlapping tensors": (
        header(tensor("a", [8]), tensor("b", [8], offset=16), tensors=2) + bytes(200),
        "tensors a and b overlap",
    ),
    "an alignment of 0": (
        header(field("general.alignment", U32, bytes(4)), fields=1),
        "general.alignment is 0",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_gguf_header_that_lies_is_refused(name, tmp_path):
    data, message = HOSTILE[name]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=rf"m.gguf: not a readable GGUF file: .*{message}"):
        _ = GgufFile(tmp_path / "m.gguf").config


def test_a_header_is_read_as_the_gguf_package_reads_it(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", hf_tensors(), kind=gguf.GGMLQuantizationType.Q8_0)
    ours, theirs = read_header(LocalFile(path)), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    assert len(fields) > 15
    assert {n: (t.kind, t.shape, t.start, t.size) for n, t in ours.tensors.items()} == {
        t.name: (t.tensor_type, tuple(map(int, t.shape[::-1])), t.data_offset, t.n_bytes)
        for t in theirs.tensors
    }


def test_a_gguf_file_that_was_cut_short_is_refused_when_it_is_opened(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", hf_tensors())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"tensor output.weight ends at byte .* cut short"):
        _ = open_checkpoint(path).config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block_count", 4_000_000_000, "block_count = 4000000000; expected a whole number from 1"),
        ("attention.head_count", 0, "attention.head_count = 0; expected"),
        ("attention.head_count_kv", 0, "attention.head_count_kv = 0; expected"),
        ("embedding_length", 0, "embedding_length = 0; expected"),
        ("context_length", 0, "context_length = 0; expected"),
        ("vocab_size", 4_000_000_000, "vocab_size = 4000000000; expected"),
        ("attention.head_count", [4, 4], r"head_count = \[4, 4\]; expected"),
        ("block_count", "2", "block_count = '2'; expected"),
        ("attention.layer_norm_rms_epsilon", float("nan"), "epsilon = nan; expected a number"),
        ("rope.freq_base", float("inf"), "freq_base = inf; expected a number"),
        ("attention.causal", False, "attention.causal = False is not supported"),
    ],
)
def test_absurd_gguf_metadata_is_refused_by_name(monkeypatch, tmp_path, key, value, message):
    add = gguf.GGUFWriter.add_key_value

    def other(self, name, old, *rest, **more):
        if name != f"llama.{key}":
            add(self, name, old, *rest, **more)

    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", other)
    write = gguf.GGUFWriter.write_header_to_file

    def with_value(self, *rest):
        kinds = gguf.GGUFValueType
        kind = kinds.UINT32 if type(value) is int else kinds.get_type(value)
        of = kinds.UINT32 if kind == kinds.ARRAY else None
        add(self, f"llama.{key}", value, kind, of)
        write(self, *rest)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_value)
    path = write_gguf(tmp_path / "m.gguf", hf_tensors())
    with pytest.raises(ValueError, match=message):
        _ = open_checkpoint(path).config


def indexed(directory, weight_map):
    """A directory whose weights are in one file that an index names."""
    write_hf(directory, hf_tensors())
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    whole = {"weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(whole))
    return directory


@pytest.mark.parametrize(
    "file",
    [
        *("../x.safetensors", "/etc/passwd", "/x.safetensors", "a/x.safetensors", "..", ""),
        *("x.bin", "a\\x.safetensors", "\x00.safetensors", ".x.safetensors", 7, None, ["x"]),
    ],
)
def test_an_index_that_leads_out_of_its_directory_is_refused(tmp_path, file):
    (tmp_path / "x.safetensors").write_bytes(b"private")
    directory = indexed(tmp_path / "model", {"model.norm.weight": file})
    message = rf"index.json: tensor 'model.norm.weight' is in {re.escape(repr(file))}; expected"
    with pytest.raises(ValueError, match=message):
        _ = open_checkpoint(directory).files.weight_files
    with pytest.raises(ValueError, match=message):
        _weights(directory)


@pytest.mark.parametrize("index", [b"[]", b"{}", b'{"weight_map": 3}', b"\xff", b"[" * 10**5])
def test_a_broken_index_is_named(tmp_path, index):
    directory = indexed(tmp_path, {})
    (directory / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json: "):
        _ = open_checkpoint(directory).files.weight_files


def test_weights_may_be_links_to_files_but_not_to_devices(tmp_path):
    """The hub's cache is made of links to files without suffixes."""
    directory = write_hf(tmp_path / "model", hf_tensors())
    (directory / "model.safetensors").rename(tmp_path / "blob")
    (directory / "model.safetensors").symlink_to("../blob")
    assert len(open_checkpoint(directory).files.shapes) == 21
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        _ = open_checkpoint(directory).files.weight_files


def safetensors(entries, data=bytes(16), length=None):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, end, *, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "data",
    [
        safetensors({"a": entry(0, 16, shape=(4,))}, length=2**62),
        safetensors({"a": entry(0, 16, shape=(4,))}, length=10**6),
        safetensors({"a": entry(0, 8), "b": entry(4, 12)}),
        safetensors({"a": entry(0, 8), "b": entry(8, 2**60)}),
        safetensors({"a": entry(8, 0), "b": entry(0, 16)}),
        safetensors({"a": entry(0, 16, shape=(2**62, 2**62))}),
        safetensors({"a": entry(0, 16, shape=(5,))}),
        safetensors({"a": entry(0, 16, shape=(4,))}, data=bytes(15)),
        b"",
        b"[" * 10**5,
    ],
    ids=[
        "2**62",
        "beyond",
        "overlap",
        "out of range",
        "backwards",
        "huge",
        "shape",
        "cut",
        "",
        "[",
    ],
)
def test_a_safetensors_header_that_lies_is_refused_with_the_files_name(tmp_path, data):
    directory = write_hf(tmp_path, hf_tensors())
    (directory / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model.safetensors: weights cannot be read: "):
        open_checkpoint(directory).load()


def test_in_several_files_the_one_that_was_cut_short_is_named(tmp_path):
    tensors = hf_tensors()
    directory = indexed(tmp_path, dict.fromkeys(tensors, "model-1.safetensors"))
    path = directory / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model-1.safetensors: weights cannot be read: .*again"):
        open_checkpoint(directory).load()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.bool_])
def test_integers_are_not_read_as_weights(tmp_path, dtype):
    tensors = hf_tensors()
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(dtype)
    directory = write_hf(tmp_path, tensors)
    with pytest.raises(ValueError, match=rf"not readable: {name} is stored as [IUB]"):
        open_checkpoint(directory).load()
    with pytest.raises(ValueError, match=rf"tensor {name} is stored as .* unquantised checkpoint"):
        open_checkpoint(directory).files.read(name)


def test_other_tensors_than_weights_may_be_integers(tmp_path):
    tensors = hf_tensors() | {"model.rotary_emb.inv_freq": np.zeros(4, np.int64)}
    open_checkpoint(write_hf(tmp_path, tensors)).load()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'"x"',
        b"null",
        b"\xff{}",
        b"[" * 10**5,
        b'{"a": ' + b"1" * 5000 + b"}",
    ],
    ids=["empty", "cut", "list", "number", "string", "null", "bytes", "deep", "digits"],
)
def test_a_broken_config_is_an_error_with_its_name(tmp_path, content):
    directory = write_hf(tmp_path, hf_tensors())
    (directory / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.json: (not valid JSON|expected)"):
        _ = open_checkpoint(directory).config


def test_a_config_of_absurd_length_is_not_read(tmp_path):
    directory = write_hf(tmp_path, hf_tensors())
    with Path(directory / "config.json").open("r+b") as file:
        file.truncate(2**40)  # without taking room on the disk
    with pytest.raises(ValueError, match=r"config.json: 1,099,511,627,776 bytes; expected at most"):
        _ = open_checkpoint(directory).config


def test_a_file_in_which_every_size_is_as_large_as_allowed_is_refused_for_its_tensors(tmp_path):
    sizes = {"hidden_size": 2**18, "intermediate_size": 2**21, "num_hidden_layers": 2**12}
    heads = {"num_attention_heads": 2**12, "num_key_value_heads": 2**12, "head_dim": 2**12}
    directory = write_hf(tmp_path, hf_tensors(), HF_CONFIG | sizes | heads | {"vocab_size": 2**24})
    save_file(hf_tensors(), directory / "model.safetensors")
    with pytest.raises(ValueError, match="tensors do not fit the config"):
        open_checkpoint(directory).load()
