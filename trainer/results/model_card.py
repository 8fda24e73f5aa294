"""An exported student's model card: what it is, what it learned from and how good it became.

The same run gives the same card; places on a disk are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decant.models import ModelConfig
from decant.trainer.results.evaluate import read_evaluation
from decant.trainer.run.metrics_log import read_metrics
from decant.trainer.run.speed import multiplying_parameters

HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- distillation
- decant
---
"""

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""

MEASURES = {
    "heldout_kl_bound": "KL to the teacher at T = 1, nats a token, at least",
    "heldout_kl_estimate": "the same, estimated with the corpus' mean tail",
    "heldout_kl_unbiased": "the same, from draws of the tail",
    "heldout_ce": "cross-entropy, nats a token",
    "heldout_perplexity": "perplexity",
    "heldout_agreement": "likeliest token is the teacher's",
    "heldout_top5_agreement": "shared of the teacher's five likeliest",
    "heldout_accuracy": "likeliest token is the next one",
    "heldout_ece": "expected calibration error",
    "heldout_acceptance": "speculative decoding would keep of its tokens",
    "heldout_tokens": "tokens judged",
}
"""What of a judgement stands in the card, and in words."""


def model_card(
    config: ModelConfig,
    *,
    name: str,
    run: Path,
    step: int,
    settings: Mapping[str, Any],
    caches: Sequence[Mapping[str, Any]],
) -> str:
    """The README.md of a student after `step` updates of the run with these settings."""
    kinds = ("loss.", "data.", "student.", "optimiser.")
    chosen = [k for kind in kinds for k in sorted(settings) if k.startswith(kind)]
    shown = {k: _placeless(settings[k]) for k in chosen}
    sections = [
        f"{HEAD}\n# {name}\n",
        f"A student of {config.num_layers} blocks and width {config.hidden_size} "
        f"(family {config.family}, {multiplying_parameters(config) / 1e6:,.1f} million parameters "
        "that multiply, the head's included) that learned from a cache of what its teacher said, "
        f"in {step:,} updates.\n",
        USE.format(name=name),
        "## Learned from\n",
        *(_table(_data(cache)) for cache in caches),
        "## Held out\n",
        _judged(run, step),
        "## Settings\n",
        _table(shown),
        "Its license is that of the weights that it began from and of what it was trained on.\n",
    ]
    return "\n".join(sections)


def _data(cache: Mapping[str, Any]) -> dict[str, Any]:
    train, heldout, logits = cache["train"], cache["heldout"], cache["logits"]
    return {
        "cache_id": cache["cache_id"],
        "teacher_id": cache["teacher_id"],
        "rows_id": cache["rows_id"],
        **{f"signal_id {name}": found for name, found in cache["signal_ids"].items()},
        "train": f"{train['rows']:,} rows of {cache['sequence_length']} positions, "
        f"{train['tokens']:,} tokens, {train['targets']:,} with targets, "
        f"from {cache['sources']:,} files",
        "held out": f"{heldout['rows']:,} rows, {heldout['tokens']:,} tokens",
        "logits": f"top {logits['k']} and {logits['draws']} draws, `{logits['profile']}`"
        if logits["k"]
        else "none: text alone",
    }


def _judged(run: Path, step: int) -> str:
    """The whole judgement if it is of this checkpoint, else the training loop's look at it."""
    found = read_evaluation(run)
    if found is None or found["step"] != step:
        looks = [x for x in read_metrics(run) if "heldout_ce" in x and x["step"] == step]
        found = looks[-1] if looks else None
    if found is None:
        return "Not judged: `decant evaluate` before exporting does.\n"
    return _table({text: found[key] for key, text in MEASURES.items() if key in found})


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {_shown(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list) and value and all(isinstance(x, float) for x in value):
        return " – ".join(f"{x:.5g}" for x in value)
    return "–" if value is None else str(value).replace("|", "\\|")


def _placeless(value: Any) -> Any:
    """The last part of a path that says where it is on somebody's disk."""
    if isinstance(value, list):
        return [_placeless(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
