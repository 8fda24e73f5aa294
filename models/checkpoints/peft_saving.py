"""Writing a decoder's adapter as a PEFT directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from decant.models.checkpoints.adapters import Lora, adapted_matrices
from decant.models.checkpoints.hf_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from decant.models.checkpoints.saving import write_tensors
from decant.models.decoder.blocks import LORA_A, LORA_B
from decant.models.decoder.decoder import Decoder
from decant.models.families import family_of
from decant.models.families.tensor_name import TensorName

_WEIGHT = ".weight"


def save_adapter(
    model: Decoder,
    path: Path,
    tokenizer_files: Mapping[str, bytes],
    *,
    lora: Lora,
    alpha: float,
    root: bool,
    base: str,
) -> None:
    """Write a PEFT directory that `peft`, transformers and `open_checkpoint` read.

    ValueError for a family that stores an adapted matrix as part of another one.

    Args:
        model: whose adapter is written.
        path: the directory; it is made if needed.
        tokenizer_files: contents by file name.
        lora: the adapter's shape.
        alpha: its α, from which with `root` the scaling follows as in rsLoRA.
        root: see `alpha`.
        base: path or hub id of the model under the adapter.
    """
    tensors = dict(_tensors(model, lora))
    modules = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in tensors})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": root,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(name.input_first for name in _adapted(model, lora).values()),
        "modules_to_save": None,
        "inference_mode": True,
    }
    path.mkdir(parents=True, exist_ok=True)
    for file, content in tokenizer_files.items():
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_bytes(content)
    (path / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    write_tensors(tensors, path / ADAPTER_WEIGHTS, like=path / ADAPTER_CONFIG)


def inseparable(model: Decoder, lora: Lora) -> list[str]:
    """Our names of the adapted matrices that files hold together with others.

    PEFT has no adapter for them, so `save_adapter` refuses the model.
    """
    return [ours for ours, name in _adapted(model, lora).items() if name.part is not None]


def _adapted(model: Decoder, lora: Lora) -> dict[str, TensorName]:
    """Where each adapted matrix lies in Hugging Face files."""
    names = family_of(model.config).tensors(model.config)
    return {ours: names[f"blocks.{ours}"] for ours in adapted_matrices(model, lora.targets)}


def _tensors(model: Decoder, lora: Lora) -> Iterator[tuple[str, np.ndarray]]:
    """PEFT's name of each matrix, and the matrix as [output, input]."""
    for ours, name in _adapted(model, lora).items():
        if name.part is not None:
            raise ValueError(
                f"{name.hf}: holds {ours} and other matrices, so PEFT has no adapter for {ours} "
                "alone; write a whole model with --adapter merged"
            )
        a, b = (np.asarray(getattr(model.blocks, ours + part)[...]) for part in (LORA_A, LORA_B))
        layers, rank = len(a), lora.rank
        a = a.reshape(layers, -1, rank).swapaxes(1, 2)
        b = b.reshape(layers, rank, -1).swapaxes(1, 2)
        for layer in range(layers):
            module = name.hf.format(layer=layer).removesuffix(_WEIGHT)
            yield f"base_model.model.{module}.lora_A.weight", np.ascontiguousarray(a[layer])
            yield f"base_model.model.{module}.lora_B.weight", np.ascontiguousarray(b[layer])
