"""The families of models whose files we read and write: one module each, listed here."""

from decant.models.families.family import Family, TensorName
from decant.models.families.gemma2 import GEMMA2
from decant.models.families.gemma3 import GEMMA3
from decant.models.families.llama import LLAMA
from decant.models.families.mistral import MISTRAL
from decant.models.families.qwen2 import QWEN2
from decant.models.families.qwen3 import QWEN3
from decant.models.families.qwen3_moe import QWEN3_MOE

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA2, GEMMA3)

__all__ = ["FAMILIES", "Family", "TensorName", "for_gguf_architecture", "for_model_type", "named"]


def named(name: str) -> Family:
    """The family that `ModelConfig.family` names."""
    return _find("family", name, {family.name: family for family in FAMILIES})


def for_model_type(model_type: str | None) -> Family:
    """The family of a Hugging Face `config.json`."""
    known = {kind: family for family in FAMILIES for kind in family.model_types}
    return _find("config.json: model_type", model_type, known)


def for_gguf_architecture(architecture: str) -> Family:
    """The family of a GGUF file."""
    known = {kind: family for family in FAMILIES for kind in family.gguf_architectures}
    return _find("GGUF general.architecture", architecture, known)


def _find(what: str, name: str | None, known: dict[str, Family]) -> Family:
    if name is None or name not in known:
        raise ValueError(
            f"{what} is {name!r}, which we cannot run; known: {', '.join(sorted(known))}. "
            "A new family is a new module in models/families."
        )
    return known[name]
