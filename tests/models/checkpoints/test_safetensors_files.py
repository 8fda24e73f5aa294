"""Weights in several files with an index, damaged sets of files, and tied heads."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from decant.models import open_checkpoint
from tests import paths
from tests.making.models import CONFIG, HF_CONFIG, final_states, hf_tensors, write_hf

GOLDEN = paths.GOLDEN / "families"


@pytest.fixture
def directory(tmp_path):
    return write_hf(tmp_path / "model", hf_tensors())


def test_a_checkpoint_in_several_files_is_read_through_its_index(directory):
    tensors = hf_tensors()
    names = sorted(tensors)
    home = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(home.values()):
        save_file({n: tensors[n] for n in names if home[n] == file}, directory / file)
    index = {"metadata": {}, "weight_map": home}
    whole = final_states(open_checkpoint(directory).load())
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(directory)
    assert checkpoint.files.weight_files == sorted(set(home.values()))
    np.testing.assert_array_equal(final_states(checkpoint.load()), whole)


@pytest.fixture
def sharded(tmp_path):
    """Four files and their index, as transformers wrote them."""
    return Path(shutil.copytree(GOLDEN / "mistral", tmp_path / "sharded"))


FIRST, LAST = "model-00001-of-00004.safetensors", "model-00004-of-00004.safetensors"


def test_an_index_that_names_a_file_that_is_not_here_says_which(sharded):
    (sharded / LAST).unlink()
    with pytest.raises(FileNotFoundError, match=rf"names 4 files, of which {LAST} is not here"):
        open_checkpoint(sharded).load()


def test_a_tensor_that_is_not_in_the_file_that_the_index_names_is_an_error(sharded):
    tensors = load_file(sharded / LAST)
    name, array = tensors.popitem()
    save_file(tensors, sharded / LAST)
    with pytest.raises(ValueError, match=rf"tensor {name} is in {LAST}, but it is in none"):
        open_checkpoint(sharded).load()
    save_file(load_file(sharded / FIRST) | {name: array}, sharded / FIRST)
    with pytest.raises(ValueError, match=rf"tensor {name} is in {LAST}, but it is in {FIRST}"):
        open_checkpoint(sharded).load()


def test_a_tensor_in_two_files_is_an_error(sharded):
    name, array = next(iter(load_file(sharded / FIRST).items()))
    save_file(load_file(sharded / LAST) | {name: array}, sharded / LAST)
    with pytest.raises(ValueError, match=rf"{name} is in both {FIRST} and {LAST}"):
        open_checkpoint(sharded).load()


def test_a_tied_checkpoint_may_carry_its_head_if_it_is_the_embedding(tmp_path):
    tensors = hf_tensors(dataclasses.replace(CONFIG, tie_embeddings=True))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    fields = HF_CONFIG | {"tie_word_embeddings": True}
    model = open_checkpoint(write_hf(tmp_path, tensors, fields)).load()
    assert not hasattr(model, "head")
    tensors["lm_head.weight"][3, 4] += 1
    with pytest.raises(ValueError, match=r"says that lm_head.weight is model.embed_tokens.weight"):
        open_checkpoint(write_hf(tmp_path, tensors, fields)).load()
