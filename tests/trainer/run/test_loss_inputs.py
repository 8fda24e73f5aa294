"""Inputs of the loss from a cache, and the student's config before its weights are loaded."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from decant.models import Decoder, save_directory
from decant.models.families import config_to_json
from decant.models.mesh.sharding import teacher_mesh
from decant.models.text.tokenizer import Tokenizer
from decant.schemas import Cache, open_cache
from decant.trainer.config import Loss, Student
from decant.trainer.loss.layer_pairs import NO_PAIRS, HiddenPair, Pairs
from decant.trainer.run.initial_student import initial_config, teacher_config
from decant.trainer.run.loss_inputs import principal_directions, tail_prior
from tests.paths import GOLDEN


def test_only_tail_prior_needs_a_prior_in_the_cache(cache):
    mesh, loss = teacher_mesh(), Loss(tail="prior")
    nodes = tail_prior(cache, loss=loss, mesh=mesh)
    np.testing.assert_array_equal(nodes, cache.tail_prior())
    assert nodes.sharding.is_fully_replicated
    # A cache of release 0.1.
    (part,) = cache.manifest.parts
    kept = {name: sha for name, sha in part.statistics.items() if "prior" not in name}
    without = dataclasses.replace(part, statistics=kept)
    old = Cache(cache.path, dataclasses.replace(cache.manifest, parts=(without,)))
    with pytest.raises(ValueError, match=r"0000: captured without a tail prior"):
        tail_prior(old, loss=loss, mesh=mesh)
    assert tail_prior(old, loss=Loss(tail="bucket"), mesh=mesh) is None


def test_a_damaged_prior_is_an_error_that_names_it(cache):
    """A statistic is checked against the manifest when it is read."""
    (part,) = cache.manifest.parts
    altered = {**part.statistics, "tail-prior-sums.npy": "0" * 64}
    manifest = dataclasses.replace(
        cache.manifest, parts=(dataclasses.replace(part, statistics=altered),)
    )
    with pytest.raises(ValueError, match=r"tail-prior-sums.npy: checksum mismatch"):
        Cache(cache.path, manifest).tail_prior()


def test_a_student_with_smaller_heads_turns_the_same_part_of_them(tmp_path, cache):
    neox = GOLDEN / "families" / "gpt_neox" / "config.json"  # four of eight coordinates
    student = Student(init="scratch", config=neox, hidden_size=16)
    config, _ = initial_config(student, cache=cache, run=tmp_path / "run")
    assert (config.head_dim, config.rotary_dim) == (4, 2)
    config_to_json(config)


def test_a_student_with_latent_attention_keeps_the_width_of_its_heads(tmp_path, cache):
    deepseek = GOLDEN / "families" / "deepseek_v3" / "config.json"
    student = Student(init="scratch", config=deepseek, hidden_size=16, num_heads=2)
    config, _ = initial_config(student, cache=cache, run=tmp_path / "run")
    assert (config.num_heads, config.num_kv_heads) == (2, 2)
    assert (config.head_dim, config.rotary_dim, config.value_dim) == (16, 8, 12)
    config_to_json(config)


def test_the_initial_config_is_that_of_the_initial_student(cache, root, tmp_path):
    """It also gives the teacher's blocks in it, unless the source has another depth."""
    teacher, source = teacher_config(cache), str(root / "teacher")
    assert teacher.num_layers == 2

    def config_of(**student):
        config, cut_from = initial_config(Student(**student), cache=cache, run=tmp_path)
        return config.num_layers, config.hidden_size, cut_from

    assert config_of(source=source, layers=(1,)) == (1, 32, (1,))
    assert config_of(source=source, layers=2) == (2, 32, (0, 1))
    assert config_of(source=source, init="checkpoint") == (2, 32, None)
    assert config_of(init="scratch", layers=3, hidden_size=16) == (3, 16, None)
    deeper = dataclasses.replace(teacher, num_layers=4)
    tokenizer = Tokenizer.from_files(cache.tokenizer_path).files()
    save_directory(Decoder(deeper, rngs=nnx.Rngs(0)), tmp_path / "deeper", tokenizer)
    assert config_of(source=str(tmp_path / "deeper"), layers=(1, 3)) == (2, 32, None)
    # An existing run has its saved student's config, whatever became of the source.
    shutil.copytree(tmp_path / "deeper", tmp_path / "initial")
    assert config_of(source="gone", layers=(1,)) == (4, 32, None)


@pytest.mark.parametrize("content", [None, b"", b"[]", b"\xff", b'{"model_type": "llama"}'])
def test_a_damaged_config_is_named_as_what_it_is(cache, root, tmp_path, content):
    """The teacher's config in the cache is not called `student.config`."""
    copy = Path(shutil.copytree(cache.path, tmp_path / "cache"))
    config, own = copy / "tokenizer" / "config.json", tmp_path / "own.json"
    for file in (config, own):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
    opened = open_cache(copy)
    for student, file in ((Student(init="scratch"), config), (Student(config=own), own)):
        scratch = dataclasses.replace(student, init="scratch")
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(f"{file}: ")) as caught:
            initial_config(scratch, cache=opened, run=tmp_path / "run")
        assert "student.config" not in str(caught.value)


def test_parts_that_disagree_on_directions_are_refused_even_under_a_projection(narrow_cache):
    class TwoParts(Cache):
        def directions(self, name):
            raise ValueError(f"the parts have other directions of {name} each")

    cache, mesh = TwoParts(narrow_cache.path, narrow_cache.manifest), teacher_mesh()
    with_directions = Pairs(hidden=((HiddenPair(2, "hidden/2", 8, directions=True),),))
    matrices = principal_directions(narrow_cache, pairs=with_directions, mesh=mesh)
    np.testing.assert_array_equal(matrices["hidden/2"], narrow_cache.directions("hidden/2"))
    projected = Pairs(hidden=((HiddenPair(2, "hidden/2", 8, projection="hidden-0-0"),),))
    assert principal_directions(narrow_cache, pairs=projected, mesh=mesh) == {}
    with pytest.raises(ValueError, match="other directions of hidden/2"):
        principal_directions(cache, pairs=projected, mesh=mesh)
    assert principal_directions(cache, pairs=NO_PAIRS, mesh=mesh) == {}
