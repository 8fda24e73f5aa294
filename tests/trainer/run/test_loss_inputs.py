"""What a loss asks of a cache, and the answer when the cache does not have it."""

import dataclasses
import shutil

import numpy as np
import pytest
from flax import nnx

from decant.models import Decoder, save_directory
from decant.models.mesh.sharding import teacher_mesh
from decant.models.text.tokenizer import Tokenizer
from decant.schemas import Cache
from decant.trainer.config import Loss, Student
from decant.trainer.loss.layer_pairs import NO_PAIRS, HiddenPair, Pairs
from decant.trainer.run.initial_student import initial_config, teacher_config
from decant.trainer.run.loss_inputs import principal_directions, tail_prior


def test_prior_needs_one_and_nothing_else_asks_for_it(cache):
    mesh, loss = teacher_mesh(), Loss(tail="prior")
    nodes = tail_prior(cache, loss=loss, mesh=mesh)
    np.testing.assert_array_equal(nodes, cache.tail_prior())
    assert nodes.sharding.is_fully_replicated
    # As version 0.1 left its caches.
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


def test_a_student_s_shape_is_known_before_its_weights(cache, root, tmp_path):
    """And which of the teacher's blocks it is cut from: not if its source is of another depth."""
    teacher, source = teacher_config(cache), str(root / "teacher")
    assert teacher.num_layers == 2

    def found(**student):
        made, cut_from = initial_config(Student(**student), cache=cache, run=tmp_path)
        return made.num_layers, made.hidden_size, cut_from

    assert found(source=source, layers=(1,)) == (1, 32, (1,))
    assert found(source=source, layers=2) == (2, 32, (0, 1))
    assert found(source=source, init="checkpoint") == (2, 32, None)
    assert found(init="scratch", layers=3, hidden_size=16) == (3, 16, None)
    deeper = dataclasses.replace(teacher, num_layers=4)
    tokenizer = Tokenizer.from_files(cache.tokenizer_path).files()
    save_directory(Decoder(deeper, rngs=nnx.Rngs(0)), tmp_path / "deeper", tokenizer)
    assert found(source=str(tmp_path / "deeper"), layers=(1, 3)) == (2, 32, None)
    # Once a run began its own first student tells, whatever became of the source.
    shutil.copytree(tmp_path / "deeper", tmp_path / "initial")
    assert found(source="gone", layers=(1,)) == (4, 32, None)


def test_parts_that_disagree_on_directions_are_refused_even_under_a_projection(narrow_cache):
    class TwoParts(Cache):
        def directions(self, name):
            raise ValueError(f"the parts have other directions of {name} each")

    cache, mesh = TwoParts(narrow_cache.path, narrow_cache.manifest), teacher_mesh()
    along = Pairs(hidden=((HiddenPair(2, "hidden/2", 8, directions=True),),))
    found = principal_directions(narrow_cache, pairs=along, mesh=mesh)
    np.testing.assert_array_equal(found["hidden/2"], narrow_cache.directions("hidden/2"))
    projected = Pairs(hidden=((HiddenPair(2, "hidden/2", 8, projection="hidden-0-0"),),))
    assert principal_directions(narrow_cache, pairs=projected, mesh=mesh) == {}
    with pytest.raises(ValueError, match="other directions of hidden/2"):
        principal_directions(cache, pairs=projected, mesh=mesh)
    assert principal_directions(cache, pairs=NO_PAIRS, mesh=mesh) == {}
