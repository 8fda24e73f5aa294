"""A run's initial student: its shape and its first weights.

It is saved in the run's directory: a continued run needs neither its source nor the teacher. Of a
student with an adapter on a whole checkpoint only config and tokenizer are saved.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from decant.models import Decoder, ModelConfig, save_directory
from decant.models.checkpoints.cut import cut_layers, spread_layers
from decant.models.checkpoints.hf_layout import CONFIG
from decant.models.checkpoints.hub import without_commit
from decant.models.checkpoints.saving import save_shape
from decant.models.families import config_from_file
from decant.models.numerics import dtype_named
from decant.models.text.tokenizer import tokenizer_of
from decant.schemas import Cache
from decant.schemas.disk import inside
from decant.schemas.disk.atomic import write_json
from decant.schemas.disk.identity import file_sha256
from decant.trainer.config import Student
from decant.trainer.run.adapter import AdapterRecord, base_identity
from decant.trainer.run.new_vocabulary import with_vocabulary
from decant.trainer.run.saved_initial import CHECKSUMS, INITIAL, load_initial_student, open_initial
from decant.trainer.run.source import Source, StudentOfRun, open_source


def initial_student(
    config: Student, *, cache: Cache, run: Path, dtype: str, seed: int, mesh: Mesh | None = None
) -> Decoder:
    """The run's initial student, loaded from its directory; a new run builds and saves it first.

    `dtype` is the compute type; trained weights are float32. `seed` is that of weights from
    scratch. On a mesh each device reads only its shard. Raises ValueError if student and cache do
    not fit.
    """
    directory = run / INITIAL
    if not directory.is_dir():
        partial = run / f".{INITIAL}.partial"
        inside.remove(run, Path(partial.name))  # of a killed run, or a link to somewhere
        _write_initial(config, partial, cache=cache, dtype=dtype, seed=seed)
        sums = {file.name: file_sha256(file) for file in sorted(partial.iterdir())}
        write_json(partial / CHECKSUMS, sums)
        partial.rename(directory)
    return load_initial_student(run, dtype=dtype, mesh=mesh, source=config.source)


def _write_initial(
    config: Student, directory: Path, *, cache: Cache, dtype: str, seed: int
) -> None:
    """Write a new student. It is whole on one device, and then loaded sharded."""
    adapter, tokenizer = AdapterRecord.of(config, seed=seed), tokenizer_of(cache)
    if adapter and config.init == "checkpoint":
        base = _source(config, cache)
        if isinstance(base, StudentOfRun):
            raise ValueError(
                f"student.source {config.source!r} is a run, whose student changes if the run goes "
                f"on, so no adapter can stand on it. Use a copy: `decant export {config.source} "
                "DIRECTORY`"
            )
        save_shape(base.config, directory, tokenizer.files())
        pinned = base.name if without_commit(base.name) else None
        adapter = dataclasses.replace(adapter, base=base_identity(base), pinned=pinned)
    else:
        kept = adapter.dtype if adapter else "float32"
        student = build_student(config, cache=cache, dtype=dtype, seed=seed, param_dtype=kept)
        save_directory(student, directory, tokenizer.files())
    if adapter:
        adapter.write(directory)


def build_student(
    config: Student, *, cache: Cache, dtype: str, seed: int, param_dtype: str = "float32"
) -> Decoder:
    """A student by `config.init`: cut from a model, a whole model, or random weights."""
    if config.init == "scratch":
        shape = _scratch_config(config, cache)
        check_covers_cache(
            shape, cache=cache, name=f"student.config {config.config or 'of the teacher'}"
        )
        types = {"dtype": dtype_named(dtype), "param_dtype": dtype_named(param_dtype)}
        make = nnx.jit(lambda: Decoder(shape, rngs=nnx.Rngs(seed), **types))
        return make()
    if config.init == "cut" and is_aligned(cache):
        return _cut_for_aligned(config, cache, dtype=dtype, param_dtype=param_dtype)
    source = _source(config, cache)
    if config.init == "checkpoint":
        return source.load(dtype=dtype, param_dtype=param_dtype)
    layers = _cut(config, source.config)
    return cut_layers(source.load(dtype=dtype, param_dtype=param_dtype), layers)


def is_aligned(cache: Cache) -> bool:
    """Whether `decant align` made the cache: its tokenizer need not be that of the teacher."""
    return any(part.aligned for part in cache.manifest.parts)


def _cut_for_aligned(config: Student, cache: Cache, *, dtype: str, param_dtype: str) -> Decoder:
    """Blocks of a source, which may have another tokenizer than the cache."""
    source, tokenizer = open_source(config.source), tokenizer_of(cache)
    check_length(source.config, cache=cache, name=f"student.source {config.source!r}")
    layers = _cut(config, source.config)
    student = cut_layers(source.load(dtype=dtype, param_dtype=param_dtype), layers)
    if tokenizer.difference(source.tokenizer()) is None:
        check_covers_cache(source.config, cache=cache, name=f"student.source {config.source!r}")
        return student
    size = cache.manifest.vocabulary_size
    return with_vocabulary(student, own=source.tokenizer(), new=tokenizer, size=size)


def _source(config: Student, cache: Cache) -> Source:
    """The model `config.source`. ValueError unless it fits the cache."""
    source = open_source(config.source)
    check_covers_cache(source.config, cache=cache, name=f"student.source {config.source!r}")
    _check_tokenizer(source, cache)
    return source


def initial_config(
    config: Student, *, cache: Cache, run: Path
) -> tuple[ModelConfig, tuple[int, ...] | None]:
    """The config of the model that `initial_student` returns, and the teacher's blocks in it.

    The blocks are None if the student is not cut, if its source has another depth than the
    teacher, or if the run exists already.
    """
    if (run / INITIAL).is_dir():
        return open_initial(run).config, None
    if config.init == "scratch":
        return _scratch_config(config, cache), None
    source = open_source(config.source)
    if config.init == "checkpoint":
        return source.config, None
    layers = _cut(config, source.config)
    if is_aligned(cache):  # no layer is compared with the teacher's
        vocabulary = cache.manifest.vocabulary_size
        return source.config.with_layers(layers).with_vocabulary(vocabulary), layers
    same_depth = source.config.num_layers == teacher_config(cache).num_layers
    return source.config.with_layers(layers), layers if same_depth else None


def teacher_config(cache: Cache) -> ModelConfig:
    """The config of the cache's teacher."""
    return config_from_file(cache.tokenizer_path / CONFIG)


def _cut(config: Student, source: ModelConfig) -> tuple[int, ...]:
    layers = config.layers
    return spread_layers(layers, source) if isinstance(layers, int) else layers


def check_covers_cache(model: ModelConfig, *, cache: Cache, name: str) -> None:
    """Raise ValueError unless the model has every token id and position of the cache.

    `name` names the model in the message.
    """
    vocabulary = cache.manifest.vocabulary_size
    if model.vocab_size < vocabulary:
        raise ValueError(
            f"{cache.path}: captured with a vocabulary of {vocabulary} tokens, but {name} has only "
            f"{model.vocab_size}; token ids would not line up. Use a student with the teacher's "
            "tokenizer (student.init = scratch without student.config has it), or capture again "
            "with a teacher that has the student's tokenizer"
        )
    check_length(model, cache=cache, name=name)


def check_length(model: ModelConfig, *, cache: Cache, name: str) -> None:
    """Raise ValueError unless the model has every position of the cache; `name` as above."""
    length = cache.manifest.sequence_length
    if model.longest_row < length:
        raise ValueError(
            f"{cache.path}: rows of {length} tokens, but {name} has "
            f"{model.longest_row} positions; choose another student or capture again with "
            f"--corpus.sequence-length {model.longest_row}"
        )


def _check_tokenizer(source: Source, cache: Cache) -> None:
    if why := tokenizer_of(cache).difference(source.tokenizer()):
        raise ValueError(
            f"{cache.path}: captured with another tokenizer than student.source {source.name!r} "
            f"has; token ids would not line up. {why}. Use a source with the tokenizer in "
            f"{cache.tokenizer_path}, train from scratch, or capture again with a teacher that has "
            "the student's tokenizer"
        )


def _scratch_config(config: Student, cache: Cache) -> ModelConfig:
    """The config of `student.config` or of the teacher, with the sizes that the settings give."""
    shape = config_from_file(config.config) if config.config else teacher_config(cache)
    names = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
    sizes = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.config is None:
        layers = config.layers
        sizes["num_layers"] = layers if isinstance(layers, int) else len(layers)
    if "hidden_size" in sizes or "num_heads" in sizes:
        heads = sizes.get("num_heads", shape.num_heads)
        if shape.latent_dim:  # each head keeps its width and has keys of its own
            return dataclasses.replace(shape, **sizes | {"num_kv_heads": heads})
        sizes["head_dim"] = sizes.get("hidden_size", shape.hidden_size) // heads
        if shape.rotary_dim is not None:  # the same part of a head is turned
            pairs = round(sizes["head_dim"] * shape.rotary_dim / shape.head_dim / 2)
            sizes["rotary_dim"] = 2 * max(1, pairs)
    return dataclasses.replace(shape, **sizes)
