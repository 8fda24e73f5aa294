"""Models of images and text, of which we run the text: where its config and its tensors lie.

A text that has no image in it goes through the text model alone, so nothing else is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from decant.models.families.field_reader import FieldReader

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)


def _sizes(*values: int | None) -> dict[str, Any]:
    return dict(zip(_SIZES, values, strict=True))


# What `text_config` leaves out where it has the default of its class in transformers.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": _sizes(262208, 2304, 9216, 26, 8, 4, 256, 131072),
    "gemma3n_text": _sizes(262400, 2048, 16384, 35, 8, 2, 256, 32768),
    "gemma4_text": _sizes(262144, 2304, 9216, 30, 8, 4, 256, 131072),
    "mistral": _sizes(32000, 4096, 14336, 32, 32, 8, 128, 131072),
    "ministral3": _sizes(131072, 4096, 14336, 34, 32, 8, 128, 262144) | {"rms_norm_eps": 1e-5},
    # Not rope_theta: it has had two defaults, 5e6 and 5e5.
    "qwen3_vl_text": _sizes(151936, 4096, 22016, 32, 32, 32, 128, 128000) | {"rope_theta": ...},
    "qwen3_vl_moe_text": _sizes(151936, 2048, 5632, 24, 16, 16, None, 128000)
    | {"moe_intermediate_size": 1408, "num_local_experts": 60, "num_experts_per_tok": 4}
    | {"rope_theta": ...},
    "qwen3_5_text": _sizes(248320, 4096, 12288, 32, 16, 4, 256, 32768),
    "qwen3_5_moe_text": _sizes(248320, 2048, None, 40, 16, 2, 256, 32768),
    "qwen2_5_vl_text": _sizes(152064, 8192, 29568, 80, 64, 8, None, 32768)
    | {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
}


@dataclasses.dataclass(frozen=True)
class Tower:
    """How one kind of model of images and text holds its text model."""

    text_types: tuple[str, ...]
    """Values of `text_config.model_type`; the first if there is none."""
    same_as: str | None = None
    """The model_type of which the text model is one by another name. None: its own."""
    flat: bool = False
    """The fields of the text may stand beside those of the whole model, without `text_config`."""
    always: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `same_as` that the text model does not have, and their values in it."""


TOWERS = {
    "gemma3": Tower(("gemma3_text",)),
    "gemma3n": Tower(("gemma3n_text",)),
    "gemma4": Tower(("gemma4_text",)),
    "mistral3": Tower(("mistral", "ministral3")),
    # With deep layers of its image part switched off, as without images, it is Qwen 3.
    "qwen3_vl": Tower(("qwen3_vl_text",), same_as="qwen3"),
    "qwen3_vl_moe": Tower(
        ("qwen3_vl_moe_text",), same_as="qwen3_moe", always={"norm_topk_prob": True}
    ),
    "kimi_k25": Tower(("deepseek_v3", "kimi_k2")),
    "qwen3_5": Tower(("qwen3_5_text",)),
    "qwen3_5_moe": Tower(("qwen3_5_moe_text",)),
    "qwen2_5_vl": Tower(("qwen2_5_vl_text",), same_as="qwen2", flat=True),
}
"""By `model_type` of the whole model."""

# Fields of the whole model that only images and sounds need.
_IMAGES = re.compile(
    r".*(image|video|vision|project(or|ion)|bo[ia]_token|eo[ia]_token|audio|mm_tokens|merge_size).*"
    r"|media_placeholder_token_id|ignore_index"
)
# Both spellings that transformers has used, the text's and the other parts'.
_TEXT = re.compile(r"(?:language_model\.(?=model\.|lm_head\.)|(?<=^model\.)language_model\.)")
# Beside images, layers that guess further tokens.
_OTHERS = re.compile(
    r"(model\.)?(vision_tower|visual|multi_modal_projector|mm_projector|mtp|audio_tower"
    r"|embed_(vision|audio))\..*"
)


def is_tower(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model of images and text whose text model we run."""
    kind = fields.get("model_type")
    return isinstance(kind, str) and kind in TOWERS


def text_fields(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a text model's config.json; those of another model as they are.

    ValueError if a field of the whole model may change the text's function.
    """
    if not is_tower(fields):
        return fields
    tower = TOWERS[fields["model_type"]]
    if tower.flat and fields.get("text_config") is None:
        own = {n: v for n, v in fields.items() if n != "model_type" and not _IMAGES.fullmatch(n)}
        fields = {**fields, "text_config": own}
    reader = FieldReader("config.json", fields)
    text = reader.section("text_config")
    if not text.fields:
        raise ValueError("config.json: text_config is missing, which describes the text model.")
    text.require("model_type", *tower.text_types)
    for name, value in tower.always.items():
        text.require(name, value)
    kind = text.take("model_type", tower.text_types[0])
    reader.ignore("tie_word_embeddings", "quantization_config", "compression_config")
    reader.ignore("language_model_only")
    reader.ignore(*filter(_IMAGES.fullmatch, fields))
    # Some programs repeat the text's fields.
    reader.ignore(*(n for n, value in text.fields.items() if fields.get(n) == value))
    reader.finish()
    # The text model's own flag counts: what wraps it may have another default, unused.
    tied = {name: fields[name] for name in ("tie_word_embeddings",) if name in fields}
    whole = {**_DEFAULTS.get(kind, {}), **tied, **text.fields, **tower.always}
    whole["model_type"] = tower.same_as or kind
    for name in ("rope_scaling", "rope_parameters"):
        whole[name] = without_grid(whole.get(name), whole)
    if whole.get("rope_theta") is ...:
        raise ValueError("config.json: text_config: field 'rope_theta' is missing.")
    return whole


def without_grid(rope: Any, whole: dict[str, Any]) -> Any:
    """A rotation's fields without those that share the pairs among time, height and width.

    A text's three positions are one, so each pair turns by it.
    """
    if not isinstance(rope, Mapping):
        return rope
    if "rope_theta" in rope and whole.get("rope_theta") is ...:
        del whole["rope_theta"]
    grid = ("mrope_section", "mrope_interleaved")
    kinds = [n for n in ("type", "rope_type") if rope.get(n) == "mrope"]
    return {n: v for n, v in rope.items() if n not in (*grid, *kinds)}


def text_name(name: str) -> str:
    """The text model's name of a tensor that the files of a whole model spell in either way."""
    return _TEXT.sub("", name, count=1)


def text_tensors(names: Mapping[str, Any]) -> dict[str, str]:
    """The text model's name of each tensor that is not another part's → its name in the files.

    ValueError if two tensors get one name.
    """
    found: dict[str, str] = {}
    for name in names:
        if not _OTHERS.fullmatch(name):
            ours = text_name(name)
            if ours in found:
                raise ValueError(f"tensors {found[ours]} and {name} are both {ours}.")
            found[ours] = name
    return found
