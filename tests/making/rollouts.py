"""Rollouts of a writer that never existed, for the tiny teacher of `caches.py`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.config import Precompute
from tests.making.caches import WORDS, tiny_settings, write_teacher

FILE = "rollouts.jsonl"


def write_rollouts(file: Path, tokenizer: Tokenizer, *, prompts: int = 12, samples: int = 3):
    """Several completions a prompt, of random ids, which no tokenizer would spell so.

    The last sample of each prompt has no ids; two of three end with EOS.
    """
    random = np.random.default_rng(5)
    records = []
    for prompt in range(prompts):
        text = " ".join(WORDS[(prompt * n + n) % len(WORDS)] for n in range(1, 6))
        for sample in range(samples):
            records.append(_record(text, tokenizer, random, sample=sample))
    file.write_text("".join(json.dumps(one) + "\n" for one in records))


def _record(
    prompt: str, tokenizer: Tokenizer, random: np.random.Generator, *, sample: int
) -> dict[str, Any]:
    letters = tokenizer.encode_batch(["abcdefghijklmnopqrstuvwxyz "])[0]
    written = random.choice(letters, 20 + 30 * sample).tolist()
    text = tokenizer.decode(written)
    ended = [tokenizer.eos_id] if sample else []
    if sample == 2:
        count = len(tokenizer.encode_batch([text])[0]) + 1
        ids = {}
    else:
        count = len(written) + len(ended)
        ids = {
            "prompt_ids": tokenizer.encode_batch([prompt])[0].tolist(),
            "completion_ids": written + ended,
        }
    logprobs = (-random.exponential(2, count)).tolist()
    writer = {} if sample == 2 else {"writer": f"writer-{sample}"}
    return {
        "prompt": prompt,
        "completion": text,
        "logprobs": logprobs,
        "tokenizer": tokenizer.digest,
        **ids,
        **writer,
    }


def rollout_settings(root: Path, **changes: Any) -> Precompute:
    """`tiny_settings` for a corpus of rollouts; writes it if it is missing."""
    file = root / "corpus" / FILE
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_rollouts(file, Tokenizer.from_files(write_teacher(root / "teacher")))
    config = tiny_settings(root, **{"shard_bytes": 1 << 14, "batch_rows": 8, **changes})
    return dataclasses.replace(
        config, corpus=dataclasses.replace(config.corpus, files=(str(file),))
    )
