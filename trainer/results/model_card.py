"""The model card of an exported student: its shape, data, held-out metrics and settings.

The same run gives the same card; the card contains no absolute path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decant.models import ModelConfig
from decant.trainer.judging.headline import ESTIMATES, Estimate, common_estimate
from decant.trainer.judging.teacher_reference import teacher_ce
from decant.trainer.results.evaluate import read_evaluation
from decant.trainer.results.judged_on import describe
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
    "heldout_ce": "cross-entropy, nats a token",
    "heldout_perplexity": "perplexity",
    "heldout_bits_per_byte": "cross-entropy, bits per byte of text",
    "heldout_agreement": "likeliest token is the teacher's",
    "heldout_top5_agreement": "share of the teacher's five likeliest tokens in the student's five",
    "heldout_accuracy": "likeliest token is the next token",
    "heldout_ece": "expected calibration error",
    "heldout_acceptance": "share of its draft tokens that speculative decoding keeps",
    "heldout_tokens": "tokens evaluated",
}
"""Metrics in the card after the headline, with their descriptions."""


def model_card(
    config: ModelConfig,
    *,
    name: str,
    run: Path,
    step: int,
    weights: str,
    settings: Mapping[str, Any],
    caches: Sequence[Mapping[str, Any]],
) -> str:
    """The text of README.md for a student after `step` updates of a run.

    `weights` is the `weights_sha256` of its parameters, `settings` are the run's from `run.json`,
    `caches` the facts from its `data.json`.
    """
    kinds = ("loss.", "data.", "student.", "optimiser.")
    chosen = [k for kind in kinds for k in sorted(settings) if k.startswith(kind)]
    shown = {k: _without_directory(settings[k]) for k in chosen}
    sections = [
        f"{HEAD}\n# {name}\n",
        f"A student of {config.num_layers} blocks and width {config.hidden_size} "
        f"(family {config.family}, {multiplying_parameters(config) / 1e6:,.1f} million parameters "
        "in matrix products, the head included), distilled in "
        f"{step:,} updates from a cache of its teacher's outputs.\n",
        USE.format(name=name),
        "## Training data\n",
        *(_table(_data(cache)) for cache in caches),
        "## Held-out metrics\n",
        _metrics(run, step, weights=weights, cache_id=caches[0]["cache_id"]),
        "## Settings\n",
        _table(shown),
        "License: that of the initial weights and of the training data.\n",
    ]
    return "\n".join(sections)


def _data(cache: Mapping[str, Any]) -> dict[str, Any]:
    train, heldout, logits = cache["train"], cache["heldout"], cache["logits"]
    return {
        "cache_id": cache["cache_id"],
        "teacher_id": cache["teacher_id"],
        "rows_id": cache["rows_id"],
        **{f"signal_id {name}": signal_id for name, signal_id in cache["signal_ids"].items()},
        "train": f"{train['rows']:,} rows of {cache['sequence_length']} positions, "
        f"{train['tokens']:,} tokens, {train['targets']:,} with targets, "
        f"from {cache['sources']:,} files",
        "held out": f"{heldout['rows']:,} rows, {heldout['tokens']:,} tokens",
        "logits": f"top {logits['k']} and {logits['draws']} draws, `{logits['profile']}`"
        if logits["k"]
        else "none: rows only",
    }


def _metrics(run: Path, step: int, *, weights: str, cache_id: str) -> str:
    """The evaluation if it is of these weights, else the training loop's held-out metrics."""
    metrics = read_evaluation(run)
    if metrics and metrics["step"] == step and metrics.get("weights", weights) == weights:
        judged_on = describe(metrics)
    else:
        lines = [x for x in read_metrics(run) if "heldout_ce" in x and x["step"] == step]
        metrics = lines[-1] if lines else None
        judged_on = f"held-out rows of cache {cache_id[:12]}, while training"
    if metrics is None:
        return "Not evaluated: run `decant evaluate` before `decant export`.\n"
    headline = common_estimate([metrics])
    name = f"{headline.title}: KL to the teacher at T = 1, nats a token; {headline.meaning}"
    kl = f"{metrics[headline.metric]:.5g}"
    if metrics.get("heldout_kl_error"):
        kl += f" ± {metrics['heldout_kl_error']:.2g}"
    measures = {text: metrics[key] for key, text in MEASURES.items() if key in metrics}
    teacher = {
        "the teacher's own cross-entropy": teacher_ce(metrics),
        "the teacher's likeliest token is the next token": metrics.get("heldout_teacher_accuracy"),
    }
    measures |= {text: value for text, value in teacher.items() if value is not None}
    return _table({"judged on": judged_on, name: kl, **measures}) + _other_kls(metrics, headline)


def _other_kls(metrics: Mapping[str, Any], headline: Estimate) -> str:
    """The other estimates of the KL, folded away; empty if there are none."""
    others = {
        f"{each.title}: {each.meaning}": metrics[each.metric]
        for each in ESTIMATES
        if each.metric in metrics and each is not headline
    }
    if not others:
        return ""
    return (
        f"\n<details><summary>Other estimates of the same KL</summary>\n\n{_table(others)}\n"
        "</details>\n"
    )


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {_shown(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list) and value and all(isinstance(x, float) for x in value):
        return " – ".join(f"{x:.5g}" for x in value)
    return "–" if value is None else str(value).replace("|", "\\|")


def _without_directory(value: Any) -> Any:
    """The value, with a path (or each in a list) shortened to its last part.

    A run's settings hold paths as seen from the run, such as `../../teacher`.
    """
    if isinstance(value, list):
        return [_without_directory(one) for one in value]
    is_path = isinstance(value, str) and value.startswith(("/", "."))
    return Path(value).name if is_path else value
