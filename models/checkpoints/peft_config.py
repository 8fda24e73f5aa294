"""adapter_config.json of a PEFT directory: the base of a LoRA adapter, and its scaling."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decant.models.families.field_reader import FieldReader
from decant.models.json_file import read_object

# Which modules have matrices, and how the matrices began, is all in the weights file.
_SHOWN_BY_THE_WEIGHTS = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "task_type", "auto_mapping", "peft_version", "inference_mode"),
    *("lora_dropout", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
)
# Other ways of beginning (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's weights as well.
_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
# Without what can make a regular expression of a stranger slow.
_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.|\\d\+?|\[0-9\]\+?)+\$?", re.ASCII)
_MOST_RANK = 2**16


@dataclass(frozen=True)
class PeftConfig:
    """What changes the function; the ranks are those of the matrices."""

    base: str
    """`base_model_name_or_path`, with `@revision` if the file names one."""
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    root: bool
    """rsLoRA: α is divided by the root of the rank."""
    transposed: bool
    """The base stores the adapted matrices as [input, output]."""

    def rank_of(self, module: str) -> int:
        """The rank of a module, such as `model.layers.0.self_attn.q_proj`."""
        return _of(self.rank_pattern, module, self.rank)

    def scaling(self, module: str) -> float:
        """s: the module's matrix becomes W + s·B·A."""
        rank, alpha = self.rank_of(module), _of(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)

    def identity(self) -> dict[str, Any]:
        """What enters ids: everything but the place of the base."""
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "ranks": dict(self.rank_pattern),
            "alphas": dict(self.alpha_pattern),
            "root": self.root,
            "transposed": self.transposed,
        }


def read_peft_config(path: Path) -> PeftConfig:
    """Read adapter_config.json. ValueError for an adapter that is no plain LoRA of linear maps."""
    reader = FieldReader(str(path), read_object(path))
    reader.require("peft_type", "LORA")
    reader.require("use_dora", False)
    reader.require("bias", "none")
    reader.require("init_lora_weights", *_KEEP_THE_BASE)
    base = reader.take("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise reader.error("base_model_name_or_path", base, "expected a path or a hub id")
    revision = reader.take("revision", "")
    if not isinstance(revision, str):
        raise reader.error("revision", revision, "expected a branch, tag or commit")
    config = PeftConfig(
        base=f"{base}@{revision}" if revision else base,
        rank=_rank(reader, "r", reader.take("r")),
        alpha=float(reader.number("lora_alpha")),
        rank_pattern=_patterns(reader, "rank_pattern", _rank),
        alpha_pattern=_patterns(reader, "alpha_pattern", _alpha),
        root=reader.flag("use_rslora", False),
        transposed=reader.flag("fan_in_fan_out", False),
    )
    reader.ignore(*_SHOWN_BY_THE_WEIGHTS)
    reader.finish()
    return config


def _rank(reader: FieldReader, name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MOST_RANK:
        raise reader.error(name, value, f"expected a whole number from 1 to {_MOST_RANK:,}")
    return value


def _alpha(reader: FieldReader, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 1e-30 <= value <= 1e30:
        raise reader.error(name, value, "expected a number from 1e-30 to 1e30")
    return float(value)


def _patterns(reader: FieldReader, name: str, check: Any) -> dict[str, Any]:
    section = reader.section(name)
    for pattern, value in section.fields.items():
        if not _PATTERN.fullmatch(pattern):
            raise section.error(
                pattern, value, r"expected a module's name; of patterns only . \. \d+ ^ $ are read"
            )
    return {pattern: check(section, pattern, value) for pattern, value in section.fields.items()}


def _of(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the whole name or its end, as PEFT does it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
