"""How fast updates are: seconds, tokens, and the share of the device's peak that is used.

MFU (model FLOPs utilisation, as PaLM's report defines it) counts the multiplications of the model,
not those of rematerialisation, and counts padding, which costs what tokens cost.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax

from decant.models import ModelConfig

PEAK_FLOPS: dict[str, float] = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
"""Dense bfloat16 products and sums a second of one device, from its vendor's data sheet, by how
`jax.Device.device_kind` begins; the first that fits."""

SPEED = ("step_seconds", "tokens_per_second", "mfu")
"""What of a line of metrics differs between two runs that are the same."""


class Clock:
    """Measures updates that are reported one by one, without what lies between them."""

    def __init__(self, *, flops: float | None = None, peak: float | None = None):
        """`flops` of one update, `peak` of all devices a second; None: no MFU."""
        self._flops, self._peak = flops, peak
        self.restart()

    def restart(self) -> None:
        """Measure from here: judging and saving are not training."""
        self._since, self._updates, self._tokens = time.perf_counter(), 0, 0

    def add(self, tokens: int) -> None:
        """One more update, of so many counted tokens, is done."""
        self._updates += 1
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """`SPEED` of the updates since the last reading or restart; measures on from here."""
        seconds = (time.perf_counter() - self._since) / self._updates
        found = {
            "step_seconds": round(seconds, 6),
            "tokens_per_second": round(self._tokens / self._updates / seconds, 1),
        }
        if self._flops is not None and self._peak is not None:
            found["mfu"] = round(self._flops / seconds / self._peak, 4)
        self.restart()
        return found


def update_flops(config: ModelConfig, *, rows: int, length: int) -> float:
    """Forward and backward pass of `rows` · `length` positions: 6 a parameter that multiplies,
    and attention's 12 · heads · head_dim a position, visible key and block.

    Every key of a row (or window) counts, though half of them are masked: so does everybody else.
    """
    keys = sum(min(window or length, length) for window in config.layer_windows)
    attention = 12 * config.num_heads * config.head_dim * keys
    return float(rows * length * (6 * multiplying_parameters(config) + attention))


def multiplying_parameters(config: ModelConfig) -> int:
    """Entries of the matrices that each token passes: of experts the chosen ones, and the head,
    but not the embedding, which is looked up."""
    c = config
    attention = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    experts = c.experts_per_token if c.num_experts else 1
    mlp = 3 * experts * c.hidden_size * c.intermediate_size + c.hidden_size * c.num_experts
    return c.num_layers * (attention + mlp) + c.hidden_size * c.vocab_size


def peak_flops(devices: Sequence[Any] | None = None) -> float | None:
    """Of all devices (default: all there are) together; None where one's is not known."""
    kinds = [device.device_kind for device in (jax.devices() if devices is None else devices)]
    peaks = [next((p for name, p in PEAK_FLOPS.items() if k.startswith(name)), None) for k in kinds]
    return None if None in peaks else sum(peak for peak in peaks if peak)
