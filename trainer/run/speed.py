"""Speed of updates: seconds, tokens per second, and the share of the devices' peak FLOP/s (MFU).

MFU is model FLOPs utilisation as PaLM's report defines it. It counts the model's own products, not
the repeated ones of rematerialisation. It counts padding, which costs as much as tokens do.
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
"""Peak dense bfloat16 FLOP/s of one device, from the vendor's data sheet. A key is the beginning of
`jax.Device.device_kind`; the first key that matches counts."""

SPEED = ("step_seconds", "tokens_per_second", "mfu")
"""Metrics of speed: the only ones that differ between two identical runs."""


class Clock:
    """Measures the time of updates, without the evaluations and checkpoints between them."""

    def __init__(self, *, flops: float | None = None, peak: float | None = None):
        """`flops`: FLOPs of one update. `peak`: FLOP/s of all devices. MFU needs both."""
        self._flops, self._peak = flops, peak
        self.restart()

    def restart(self) -> None:
        """Begin a new measurement, after an evaluation or a checkpoint."""
        self._since, self._updates, self._tokens = time.perf_counter(), 0, 0

    def add(self, tokens: int) -> None:
        """Count one finished update of `tokens` counted tokens."""
        self._updates += 1
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """The metrics `SPEED` of the updates since the last reading or restart; then restarts."""
        seconds = (time.perf_counter() - self._since) / self._updates
        speed = {
            "step_seconds": round(seconds, 6),
            "tokens_per_second": round(self._tokens / self._updates / seconds, 1),
        }
        if self._flops is not None and self._peak is not None:
            speed["mfu"] = round(self._flops / seconds / self._peak, 4)
        self.restart()
        return speed


def update_flops(config: ModelConfig, *, rows: int, length: int, frozen: bool = False) -> float:
    """FLOPs of the forward and backward pass of `rows` rows of `length` positions.

    Each position costs 6 FLOPs a multiplying parameter, 4 if weights are `frozen` under an adapter
    (its own are not counted), and in each block 6 · heads · (head_dim + value width) a visible
    key. Every key of a row (or window) counts as visible although half are masked, as is usual for
    MFU. Linear attention costs 6 · 3 FLOPs an entry of its heads' matrices: it is multiplied by the
    key, by what is written for it, and by the query.
    """
    attention = 0
    for stack in config.stacks.values():
        c = stack.config
        if c.layers_linear[0]:
            entries = c.linear_value_heads * c.linear_key_dim * c.linear_value_dim
            attention += 18 * entries * len(stack.layers)
        else:
            keys = sum(min(window or length, length) for window in c.layer_windows)
            attention += 6 * c.num_heads * (c.head_dim + c.value_width) * keys
    each = 4 if frozen else 6
    return float(rows * length * (each * multiplying_parameters(config) + attention))


def multiplying_parameters(config: ModelConfig) -> int:
    """Number of matrix entries that each token is multiplied with.

    They include the chosen experts and the head, but not the embedding, which is looked up.
    """
    blocks = sum(len(stack.layers) * _of_block(stack.config) for stack in config.stacks.values())
    inputs = config.hidden_size * config.num_layers * config.layer_input_dim
    copies = 2 * (config.stream_copies - 1) * config.hidden_size**2
    return blocks + inputs + copies + config.hidden_size * config.vocab_size


def _of_block(c: ModelConfig) -> int:
    """Matrix entries of one of these blocks, which are alike."""
    attention = _of_linear_attention(c) if c.layers_linear[0] else _of_attention(c)
    experts = c.experts_per_token if c.num_experts else 1
    width = experts * c.intermediate_size + c.shared_intermediate_size
    mlp = (3 if c.gated_mlp else 2) * width + c.num_experts + c.shared_expert_gate
    others = 2 * c.layer_input_dim + 2 * c.laurel_rank
    return attention + c.hidden_size * (mlp + others) + _of_copies(c)


def _of_copies(c: ModelConfig) -> int:
    """Matrix entries that predict and correct one block's copies; two products have the router."""
    count = c.stream_copies
    return count * (2 * c.hidden_size + count**2 + count) if count > 1 else 0


def _of_attention(c: ModelConfig) -> int:
    """Matrix entries of one block's attention."""
    queries, values = c.num_heads * c.head_dim, c.num_heads * c.value_width
    if not c.latent_dim:
        keys = c.num_kv_heads * (c.head_dim + (0 if c.full_keys_are_values else c.value_width))
        keys = 0 if c.reading_layers else keys
        gates = values if c.attention_gate else 0
        return c.hidden_size * (queries + keys + values + gates)
    made = c.query_latent_dim + c.latent_dim + c.turned
    still = c.num_heads * (c.head_dim - c.turned)
    read = (c.query_latent_dim or c.hidden_size) * queries + c.latent_dim * (still + values)
    return c.hidden_size * (made + values) + read


def _of_linear_attention(c: ModelConfig) -> int:
    """Matrix entries and taps of one block's linear attention."""
    keys, values = c.linear_key_heads * c.linear_key_dim, c.linear_value_heads * c.linear_value_dim
    made = 2 * keys + 2 * values + 2 * c.linear_value_heads
    return c.hidden_size * (made + values) + c.convolution * (2 * keys + values)


def peak_flops(devices: Sequence[Any] | None = None) -> float | None:
    """Peak FLOP/s of `devices` (default: all) together; None if one of them is not in the table."""
    kinds = [device.device_kind for device in (jax.devices() if devices is None else devices)]
    peaks = [next((p for name, p in PEAK_FLOPS.items() if k.startswith(name)), None) for k in kinds]
    return None if None in peaks else sum(peak for peak in peaks if peak)
