"""SmolLM3: Llama with blocks that do not rotate queries and keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import gguf_fields, json_fields
from decant.models.families.common_tensors import common_tensors
from decant.models.families.family import Family, GgufFormat
from decant.models.families.field_reader import FieldReader
from decant.models.families.windows import FULL, SLIDING, read_windows, write_switched_windows

_INTERVAL = 4


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read SmolLM3's config.json."""
    reader = FieldReader("config.json", fields)
    reader.require("hidden_act", "silu")
    reader.ignore("max_window_layers")  # transformers ignores it in this family
    rotate = _read_rotary_layers(reader)
    on, window = reader.flag("use_sliding_window", False), reader.window("sliding_window", None)
    windowed = on and window is not None
    config = ModelConfig(
        **json_fields.read_common(reader, tied=True),
        **json_fields.read_biases(reader),
        **json_fields.read_rotary(reader, theta=2e6),
        windows=read_windows(
            reader,
            window=window if on else None,
            default_types=[SLIDING if windowed and not on else FULL for on in rotate],
        ),
        rotary_layers=rotate,
        family="smollm3",
    )
    reader.finish()
    return config


def _read_rotary_layers(reader: FieldReader) -> tuple[bool, ...]:
    """Which blocks rotate: those that have a 1 in `no_rope_layers`."""
    count = reader.size("num_hidden_layers", of="num_layers")
    interval = reader.size("no_rope_layer_interval", _INTERVAL, of="num_layers")
    marks = reader.take("no_rope_layers", _every(interval, layers=count))
    if not isinstance(marks, list) or len(marks) < count or not all(m in (0, 1) for m in marks):
        raise reader.error("no_rope_layers", marks, f"expected a 0 or 1 for each of {count} blocks")
    return tuple(map(bool, marks[:count]))


def _every(interval: int, *, layers: int) -> list[int]:
    """A 0 for each block that does not rotate, one in `interval`, and a 1 for the others."""
    return [int((i + 1) % interval != 0) for i in range(layers)]


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Write SmolLM3's config.json."""
    fields = json_fields.write_common(
        config, model_type="smollm3", architecture="SmolLM3ForCausalLM"
    )
    return (
        fields
        | json_fields.write_biases(config)
        | write_switched_windows(config)
        # Transformers' default pad token is 128,004, which a small vocabulary lacks.
        | {"no_rope_layers": list(map(int, config.layers_rotate)), "pad_token_id": None}
    )


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Read SmolLM3's GGUF metadata, which do not say which blocks rotate."""
    reader = gguf_fields.architecture_fields(metadata)
    fields = gguf_fields.read_common(reader, metadata, tensors)
    reader.finish()
    rotate = _every(_INTERVAL, layers=fields["num_layers"])
    return ModelConfig(
        **fields,
        **gguf_fields.read_biases(tensors),
        rotary_layers=tuple(map(bool, rotate)),
        family="smollm3",
    )


SMOLLM3 = Family(
    name="smollm3",
    model_types=("smollm3",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    tensors=common_tensors,
    gguf=GgufFormat("smollm3", config_from_gguf, interleaves_rotary=True),
)
