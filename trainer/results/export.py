"""A run's student as a Hugging Face directory: what transformers, a next run and a next capture
can load, with a model card of what it learned and how well."""

from __future__ import annotations

import json
from pathlib import Path

from flax import nnx

from decant.models import open_checkpoint, save_directory
from decant.models.text.tokenizer import Tokenizer
from decant.schemas import open_cache
from decant.trainer.config import Export
from decant.trainer.results.model_card import model_card
from decant.trainer.run.binding import read_run_settings
from decant.trainer.run.data_facts import cache_facts, read_data_facts
from decant.trainer.run.student import INITIAL
from decant.trainer.run.trained_student import checkpoint_step, load_student

GENERATION = "generation_config.json"
CARD = "README.md"


def export(config: Export) -> Path:
    """Write a checkpoint's student; returns the directory."""
    graph, params = load_student(config.run, dtype="float32", checkpoint=config.checkpoint)
    model = nnx.merge(graph, params)
    tokenizer = open_checkpoint(config.run / INITIAL).tokenizer()
    caches = read_data_facts(config.run) or [cache_facts(open_cache(config.cache))]
    text = model_card(
        model.config,
        name=config.output.name,
        run=config.run,
        step=checkpoint_step(config.run, config.checkpoint),
        settings=read_run_settings(config.run),
        caches=caches,
    )
    # Before the weights, which say that the directory is whole.
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / CARD).write_text(text, "utf-8")
    (config.output / GENERATION).write_text(_generation(tokenizer), "utf-8")
    save_directory(model, config.output, tokenizer.files())
    return config.output


def _generation(tokenizer: Tokenizer) -> str:
    """What generating needs: without it transformers would not know where a text ends."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return json.dumps({k: v for k, v in ids.items() if v is not None}, indent=2) + "\n"
