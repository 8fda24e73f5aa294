"""The supported families, and the conversion between their files' metadata and ModelConfig."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from decant.models.config import ModelConfig
from decant.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE_LITE, YOUTU
from decant.models.families.family import Family
from decant.models.families.field_reader import shown
from decant.models.families.gemma import GEMMA
from decant.models.families.gemma2 import GEMMA2
from decant.models.families.gemma3 import GEMMA3
from decant.models.families.gemma3n import GEMMA3N
from decant.models.families.gemma4 import GEMMA4
from decant.models.families.glm import GLM, GLM4
from decant.models.families.glm4_moe import GLM4_MOE
from decant.models.families.gpt2 import GPT2
from decant.models.families.gpt_neox import GPT_NEOX
from decant.models.families.gpt_oss import GPT_OSS
from decant.models.families.granite import GRANITE, GRANITE_HYBRID
from decant.models.families.llama import LLAMA
from decant.models.families.ministral3 import MINISTRAL3
from decant.models.families.mistral import MISTRAL
from decant.models.families.mixtral import MIXTRAL
from decant.models.families.olmo import OLMO2, OLMO3
from decant.models.families.phi3 import PHI3
from decant.models.families.qwen2 import QWEN2
from decant.models.families.qwen3 import QWEN3
from decant.models.families.qwen3_moe import QWEN3_MOE
from decant.models.families.qwen3_next import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT
from decant.models.families.smollm3 import SMOLLM3
from decant.models.families.tensor_name import Naming, TensorName
from decant.models.families.towers import TOWERS, text_fields
from decant.models.json_file import read_object

Entry = TypeVar("Entry")

FAMILIES: tuple[Family, ...] = (
    *(LLAMA, SMOLLM3, MISTRAL, MINISTRAL3, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE),
    *(GEMMA, GEMMA2, GEMMA3, GEMMA3N, GEMMA4, OLMO2, OLMO3, PHI3, GRANITE, GRANITE_HYBRID),
    *(GPT2, GPT_NEOX, GPT_OSS, GLM4_MOE, GLM4_MOE_LITE),
    *(DEEPSEEK_V2, DEEPSEEK_V3, YOUTU, GLM, GLM4, QWEN3_NEXT, QWEN3_5, QWEN3_5_MOE),
)


def family_of(config: ModelConfig) -> Family:
    """The family that `config.family` names. ValueError if there is none of that name."""
    return _look_up("family", config.family, {family.name: family for family in FAMILIES})


def tensor_names(
    config: ModelConfig, naming: Naming, present: Collection[str]
) -> dict[str, TensorName]:
    """Path of each parameter → its name in files of which the tensors are named `present`."""
    family = family_of(config)
    special, prefix = family.tensors_in, family.optional_prefix
    names = special(config, naming, present) if special else family.tensors(config)
    if naming != "hf" or not prefix or any(name.startswith(prefix) for name in present):
        return names
    return {
        path: dataclasses.replace(name, hf=name.hf.removeprefix(prefix))
        for path, name in names.items()
    }


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Read the fields of a Hugging Face `config.json`.

    ValueError for an unknown `model_type`, and for any field that we would not honour.
    """
    fields = text_fields(fields)
    known = {kind: family for family in FAMILIES for kind in family.model_types}
    family = _look_up("config.json: model_type", fields.get("model_type"), known, also=TOWERS)
    return family.config_from_json(fields)


def config_from_file(path: Path) -> ModelConfig:
    """Read a `config.json`. FileNotFoundError, or ValueError that names file and field."""
    fields = read_object(path)
    try:
        return config_from_json(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('config.json: ')}") from error


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The fields of the `config.json` that `config_from_json` and transformers read back.

    ValueError if the family's `config.json` cannot express this config.
    """
    family = family_of(config)
    fields = family.config_to_json(config)
    written, ours = family.config_from_json(fields).identity(), config.identity()
    lost = [name for name in {**ours, **written} if ours.get(name) != written.get(name)]
    if lost:
        raise ValueError(
            f"ModelConfig: config.json of family {config.family!r} cannot say "
            + ", ".join(f"{n} = {ours.get(n)!r} (but {written.get(n)!r})" for n in lost)
            + "; such a model cannot be saved as one of this family. Choose another family."
        )
    return fields


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Read the metadata of a GGUF file whose tensors are named `tensors`.

    ValueError for an unknown architecture, and for any field that we would not honour.
    """
    known = {family.gguf.architecture: family.gguf for family in FAMILIES if family.gguf}
    architecture = metadata.get("general.architecture", "")
    return _look_up("GGUF general.architecture", architecture, known).config(metadata, tensors)


def _look_up(
    what: str, name: Any, known: Mapping[str, Entry], *, also: Collection[str] = ()
) -> Entry:
    """The entry of that name. ValueError that lists the known names, and those in `also`."""
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"{what} is {shown(name)}, which we cannot run; known: "
            f"{', '.join(sorted({*known, *also}))}. "
            "Choose a model of one of those; a new family is a new module in models/families."
        )
    return known[name]
