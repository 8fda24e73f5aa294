"""Tiny real captures, and a run, that all tests of the trainer share."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from decant.pipelines.config import Attention, Hidden
from decant.schemas import Cache
from decant.trainer.config import Data, Loss, Student, Train
from decant.trainer.run.train import train
from tests.making.caches import tiny_cache, write_teacher


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def cache(root) -> Cache:
    """k = 8 of 512 tokens, so that most tokens are in the tail."""
    return tiny_cache(root, k=8)


@pytest.fixture(scope="session")
def drawn_cache(root) -> Cache:
    """`cache` with six tail draws a position."""
    return tiny_cache(root, draws=6, draw_temperatures=(1.0, 2.0), output=root / "drawn")


@pytest.fixture(scope="session")
def whole_cache(root) -> Cache:
    """k = V: the tail is empty."""
    return tiny_cache(root, k=512, output=root / "whole")


@pytest.fixture(scope="session")
def layered_root(tmp_path_factory):
    """Directory with a teacher (width 32, 4 heads) whose attention is far from uniform."""
    root = tmp_path_factory.mktemp("layered")
    weights = write_teacher(root / "teacher") / "model.safetensors"
    tensors = load_file(weights)
    queries = [name for name in tensors if name.endswith("q_proj.weight")]
    save_file({**tensors, **{name: tensors[name] * 100 for name in queries}}, weights)
    return root


@pytest.fixture(scope="session")
def layered_cache(layered_root) -> Cache:
    """A cache with tail draws, hidden states of every layer and both blocks' attention maps."""
    return tiny_cache(
        layered_root,
        draws=6,
        hidden=Hidden(layers=(0, 1, 2)),
        attention=Attention(layers="all"),
    )


@pytest.fixture(scope="session")
def narrow_cache(layered_root) -> Cache:
    """A cache with hidden states along 8 directions in int8, and maps averaged over the heads."""
    return tiny_cache(
        layered_root,
        hidden=Hidden(layers=(1, 2), dtype="int8", width=8),
        attention=Attention(layers="all", heads="mean", dtype="bfloat16"),
        output=layered_root / "narrow",
    )


@pytest.fixture(scope="session")
def noisy_run(drawn_cache, root, tmp_path_factory) -> Train:
    """A run of two updates; its student is the teacher with a noisy head, so it is partly right."""
    directory = tmp_path_factory.mktemp("noisy")
    source = shutil.copytree(root / "teacher", directory / "source")
    weights = load_file(source / "model.safetensors")
    head = weights["model.embed_tokens.weight"]
    noise = np.random.default_rng(0).normal(size=head.shape) * 2 * head.std()
    weights["lm_head.weight"] = ((head + noise) / 3).astype(np.float32)
    save_file(weights, source / "model.safetensors")
    shape = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**shape, "tie_word_embeddings": False}))
    config = Train(
        cache=drawn_cache.path,
        run=directory / "run",
        student=Student(init="checkpoint", source=str(source)),
        data=Data(batch_rows=2, steps=2),
        loss=Loss(temperature=3.0, temperature_end=2.0, tail="bucket", chunk_tokens=64),
        evaluate_every=1,
        heldout_rows=None,
    )
    train(config)
    return config
