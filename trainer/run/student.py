"""The student: its first weights, kept in the run's directory so that going on needs no teacher."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from decant.models import Checkpoint, Decoder, ModelConfig, open_checkpoint, save_directory
from decant.models.checkpoints.cut import cut_layers, spread
from decant.models.numerics import dtype_named
from decant.models.text.tokenizer import tokenizer_of
from decant.schemas import Cache
from decant.trainer.config import Student

INITIAL = "initial"


def initial_student(
    config: Student, *, cache: Cache, run: Path, dtype: str, seed: int, mesh: Mesh | None = None
) -> Decoder:
    """The run's first student: as saved when the run began, after building and saving it if it is
    only beginning.

    Weights are float32; `dtype` is what it computes in. On a mesh each device's share is read from
    what was saved. Raises ValueError if student and cache do not fit each other.
    """
    directory = run / INITIAL
    if not directory.is_dir():
        student = build(config, cache=cache, dtype=dtype, seed=seed)
        tokenizer = tokenizer_of(cache)
        partial = run / f".{INITIAL}.partial"
        save_directory(student, partial, tokenizer.files())
        partial.rename(directory)
        del student  # whole on one device
    return saved_initial(run, dtype=dtype, mesh=mesh)


def saved_initial(run: Path, *, dtype: str, mesh: Mesh | None = None) -> Decoder:
    """The student that a run began with. FileNotFoundError if `run` is no run's directory."""
    directory = run / INITIAL
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: not there; {run} is not the directory of a run")
    return open_checkpoint(directory).load(dtype=dtype, param_dtype="float32", mesh=mesh)


def build(config: Student, *, cache: Cache, dtype: str, seed: int) -> Decoder:
    """A student by `config.init`: cut from a checkpoint, all of one, or random."""
    if config.init == "scratch":
        shape = _scratch_config(config, cache)
        check_fits(shape, cache=cache, name=f"student.config {config.config or 'of the teacher'}")
        make = nnx.jit(lambda: Decoder(shape, rngs=nnx.Rngs(seed), dtype=dtype_named(dtype)))
        return make()
    source = open_checkpoint(config.source)
    check_fits(source.config, cache=cache, name=f"student.source {config.source!r}")
    _check_tokenizer(source, cache)
    if config.init == "checkpoint":
        return source.load(dtype=dtype, param_dtype="float32")
    layers = _cut(config, source.config)
    return cut_layers(source, layers, dtype=dtype, param_dtype="float32")


def shape(
    config: Student, *, cache: Cache, run: Path
) -> tuple[ModelConfig, tuple[int, ...] | None]:
    """What `initial_student` will be, without its weights, and the teacher's blocks it is cut from.

    None where it is not cut, or from a model of another depth than the teacher's; also when the
    run began before.
    """
    if (run / INITIAL).is_dir():
        return open_checkpoint(run / INITIAL).config, None
    if config.init == "scratch":
        return _scratch_config(config, cache), None
    source = open_checkpoint(config.source).config
    if config.init == "checkpoint":
        return source, None
    layers = _cut(config, source)
    same_depth = source.num_layers == teacher_config(cache).num_layers
    return source.of_layers(layers), layers if same_depth else None


def teacher_config(cache: Cache) -> ModelConfig:
    """The shape of the teacher that the cache was captured from."""
    return _read_config(cache.tokenizer_path / "config.json")


def _cut(config: Student, source: ModelConfig) -> tuple[int, ...]:
    layers = config.layers
    return spread(layers, source.num_layers) if isinstance(layers, int) else layers


def check_fits(model: ModelConfig, *, cache: Cache, name: str) -> None:
    """Raise ValueError unless the model has every token and position of the cache."""
    vocabulary, length = cache.manifest.vocabulary_size, cache.manifest.sequence_length
    if model.vocab_size < vocabulary:
        raise ValueError(
            f"{cache.path}: captured over a vocabulary of {vocabulary} tokens, but {name} has only "
            f"{model.vocab_size}; token ids would not line up. Use a student with the teacher's "
            "tokenizer (student.init = scratch without student.config has it), or capture again "
            "with a teacher that shares the student's"
        )
    if model.max_positions < length:
        raise ValueError(
            f"{cache.path}: rows of {length} tokens, but {name} was made for "
            f"{model.max_positions}; choose another student or capture again with "
            f"--corpus.sequence-length {model.max_positions}"
        )


def _check_tokenizer(source: Checkpoint, cache: Cache) -> None:
    ours = source.tokenizer().digest
    if ours != cache.manifest.tokenizer:
        raise ValueError(
            f"{cache.path}: captured with tokenizer {cache.manifest.tokenizer[:12]}, but "
            f"student.source {source.name!r} uses {ours[:12]}; token ids would not line up. "
            f"Use a source with the tokenizer in {cache.tokenizer_path}, train from scratch, or "
            "capture again with a teacher that shares the student's tokenizer"
        )


def _scratch_config(config: Student, cache: Cache) -> ModelConfig:
    """The config file's (or the teacher's) shape with the sizes that are given explicitly."""
    shape = _read_config(config.config) if config.config else teacher_config(cache)
    names = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
    sizes = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.config is None:
        layers = config.layers
        sizes["num_layers"] = layers if isinstance(layers, int) else len(layers)
    if "hidden_size" in sizes or "num_heads" in sizes:
        heads = sizes.get("num_heads", shape.num_heads)
        sizes["head_dim"] = sizes.get("hidden_size", shape.hidden_size) // heads
    return dataclasses.replace(shape, **sizes)


def _read_config(path: Path) -> ModelConfig:
    if not path.is_file():
        raise FileNotFoundError(f"student.config: {path} is not there (from {Path.cwd()})")
    return ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))


def parameters(model: Decoder) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The model as a static graph and a plain nested dict of arrays."""
    graph, state = nnx.split(model, nnx.Param)
    return graph, nnx.to_pure_dict(state)
