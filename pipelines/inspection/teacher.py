"""A cache's teacher in words: family, size, number types, where it was found, ids."""

from __future__ import annotations

from collections.abc import Iterator

from decant.models.checkpoints.embedded import NAME
from decant.models.checkpoints.hf_layout import CONFIG
from decant.models.config import ModelConfig
from decant.models.families import config_from_file, family_of
from decant.schemas import Cache
from decant.schemas.manifest.plan import PlannedTeacher, read_plan

_EMBEDDED = ": SmolLM2-135M-Instruct in 4 bits"
_THOUSANDS = ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"))


def teacher_facts(cache: Cache) -> dict[str, str]:
    """What is known of the teacher, by name; what the cache's files do not say is left out."""
    return dict(_facts(cache))


def teacher_words(cache: Cache) -> str:
    """The teacher in one line: model, family, parameters, number type."""
    facts = teacher_facts(cache)
    forms = {"model": "{}", "family": "{}", "parameters": "{} parameters", "computed in": "{}"}
    known = [form.format(facts[name]) for name, form in forms.items() if name in facts]
    return ", ".join(known) or "unknown"


def _facts(cache: Cache) -> Iterator[tuple[str, str]]:
    planned = _planned(cache)
    if planned:
        yield "model", planned.model + (_EMBEDDED if planned.model == NAME else "")
    try:
        config = config_from_file(cache.tokenizer_path / CONFIG)
    except (OSError, ValueError):
        config = None
    if config:
        yield "family", family_of(config).name
        yield "parameters", _in_words(_parameters(config))
        yield "shape", _shape(config)
    if planned:
        yield "computed in", planned.dtype
        quantised = "int8, by output channel" if planned.quantize == "int8" else "as in its file"
        yield "weights", quantised
    yield "vocabulary", f"{cache.manifest.vocabulary_size:,} ids"
    yield "teacher id", cache.manifest.logits.teacher_id


def _planned(cache: Cache) -> PlannedTeacher | None:
    for part in cache.manifest.parts:
        try:
            return read_plan(cache.plan_path(part)).teacher
        except (OSError, ValueError):
            continue
    return None


def _parameters(config: ModelConfig) -> int:
    import jax
    from flax import nnx

    from decant.models import Decoder

    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _shape(config: ModelConfig) -> str:
    experts = f", {config.num_experts} experts" if config.num_experts else ""
    return (
        f"{config.num_layers} layers, width {config.hidden_size:,}, {config.num_heads} heads "
        f"({config.num_kv_heads} of keys and values){experts}"
    )


def _in_words(count: int) -> str:
    for size, name in _THOUSANDS:
        if count >= size:
            return f"{count / size:.3g} {name}"
    return str(count)
