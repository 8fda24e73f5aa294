"""Tiny but real inputs for tests: a trained tokenizer, a random teacher, a captured cache."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import tokenizers
from flax import nnx

from decant.models import Decoder, ModelConfig, save_directory
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import (
    Attention,
    Corpus,
    Hidden,
    Logits,
    Precompute,
    Signals,
    Sketch,
    Teacher,
)
from decant.schemas import Cache, open_cache

TEXT = (
    "a cache is written once and read by many students who never meet their teacher again "
    "the row keeps its key the unit keeps its rows and the part keeps its promise to them all"
)
WORDS = TEXT.split(" ")
HEAD_ONLY: dict[str, Any] = {
    "k": 8,
    "profile": "lossless",
    "draws": 0,
    "counts": 0,
    "sketch": Sketch(rank=0),
}
"""Fields of `Logits` for a quick capture of stored tokens and their tail's mass alone, exact."""


def write_corpus(directory: Path, *, files: int = 12, words: int = 400) -> Path:
    """Write `files` different text files of about `words` words each; the same at every call."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        text = " ".join(
            WORDS[(i * i + i * number + 7 * number) % len(WORDS)] + ("." if i % 11 == 0 else "")
            for i in range(words + 13 * number)
        )
        (directory / f"document-{number:03d}.txt").write_text(text)
    return directory


def write_teacher(directory: Path, *, vocabulary: int = 512, seed: int = 0, **changes: Any) -> Path:
    """Write a random two-block teacher with a byte-level BPE tokenizer, as Hugging Face files.

    `changes` replace fields of its ModelConfig.
    """
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=256,
        tie_embeddings=True,
    )
    config = dataclasses.replace(config, **changes)
    model = Decoder(config, rngs=nnx.Rngs(seed))
    # Larger than initialised, so that the distributions are far from uniform.
    model.embedding.set_value(model.embedding[...] * 25)
    save_directory(model, directory, tokenizer_files(vocabulary))
    return directory


def tokenizer_files(vocabulary: int) -> dict[str, bytes]:
    """Files of a BPE tokenizer with `vocabulary` ids, trained on `WORDS`, with EOS `<end>`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    # The text has too few merges; unused tokens fill the vocabulary.
    missing = vocabulary - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<unused-{i}>" for i in range(missing)])
    settings = {"eos_token": "<end>", "add_bos_token": False}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def tiny_settings(
    root: Path,
    *,
    sequence_length: int = 64,
    vocabulary: int = 512,
    heldout: float = 0.2,
    output: Path | None = None,
    batch_rows: int = 2,
    shard_bytes: int = 8192,
    hidden: Hidden | None = None,
    attention: Attention | None = None,
    defaults: bool = False,
    **logits: Any,
) -> Precompute:
    """Settings that capture `root/corpus` with `root/teacher` to `output`, default `root/cache`.

    Writes corpus and teacher if they are missing. `logits` are fields of `pipelines.config.Logits`;
    those left out are `HEAD_ONLY`, or the defaults of a capture if `defaults`.
    """
    if not (root / "corpus").exists():
        write_corpus(root / "corpus")
    if not (root / "teacher").exists():
        write_teacher(root / "teacher", vocabulary=vocabulary)
    return Precompute(
        corpus=Corpus(
            files=(str(root / "corpus" / "*.txt"),),
            sequence_length=sequence_length,
            heldout=heldout,
            shard_bytes=shard_bytes,
        ),
        teacher=Teacher(model=str(root / "teacher"), batch_rows=batch_rows),
        signals=Signals(
            logits=Logits(**{**({} if defaults else HEAD_ONLY), **logits}),
            hidden=hidden or Hidden(),
            attention=attention or Attention(),
        ),
        output=output or root / "cache",
    )


def command_of(config: Precompute) -> list[str]:
    """The command with settings like those of `tiny_settings`, without hidden states and maps."""
    corpus, logits = config.corpus, config.signals.logits
    return [
        "precompute",
        *("--corpus.files", *corpus.files),
        f"--corpus.sequence-length={corpus.sequence_length}",
        f"--corpus.heldout={corpus.heldout}",
        f"--corpus.shard-bytes={corpus.shard_bytes}",
        f"--teacher.model={config.teacher.model}",
        f"--teacher.batch-rows={config.teacher.batch_rows}",
        f"--signals.logits.k={logits.k}",
        f"--signals.logits.draws={logits.draws}",
        f"--signals.logits.profile={logits.profile}",
        f"--signals.logits.counts={logits.counts}",
        f"--signals.logits.sketch.rank={logits.sketch.rank}",
        f"--output={config.output}",
    ]


def tiny_cache(root: Path, **settings) -> Cache:
    """Capture and open the cache of `tiny_settings(root, **settings)`."""
    config = tiny_settings(root, **settings)
    precompute(config)
    return open_cache(config.output)
