"""A run's student as a Hugging Face directory: what transformers and a next run can load."""

from __future__ import annotations

from pathlib import Path

from flax import nnx

from models import save_directory
from models.tokenizer import tokenizer_of
from schemas import open_cache
from trainer.config import Export
from trainer.loop import load_run


def export(config: Export) -> Path:
    """Write a checkpoint's student with the cache's tokenizer; returns the directory."""
    cache = open_cache(config.cache)
    graph, params = load_run(config.run, dtype="float32", checkpoint=config.checkpoint)
    tokenizer = tokenizer_of(cache)
    save_directory(nnx.merge(graph, params), config.output, tokenizer.files())
    return config.output
