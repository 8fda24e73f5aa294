"""FLOPs of an update, worked out by hand, and the speed metrics."""

import dataclasses
import time
from types import SimpleNamespace

import pytest

from decant.models import ModelConfig
from decant.trainer.run.speed import Clock, multiplying_parameters, peak_flops, update_flops

CONFIG = ModelConfig(
    vocab_size=100,
    hidden_size=10,
    intermediate_size=20,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
)


def devices(*kinds):
    return [SimpleNamespace(device_kind=kind) for kind in kinds]


def test_parameters_that_multiply_are_the_matrices_and_the_head():
    block = 10 * 24 + 2 * 10 * 12 + 24 * 10 + 3 * 10 * 20  # q, k and v, output, MLP
    assert multiplying_parameters(CONFIG) == 3 * block + 10 * 100


def test_of_experts_the_chosen_ones_and_the_router_multiply():
    mixture = dataclasses.replace(CONFIG, num_experts=8, experts_per_token=2)
    more = 3 * 10 * 20 + 10 * 8
    assert multiplying_parameters(mixture) == multiplying_parameters(CONFIG) + 3 * more


def test_copies_of_the_residual_stream_and_the_branch_beside_attention_multiply():
    more = dataclasses.replace(CONFIG, stream_copies=3, laurel_rank=4, layer_input_dim=5)
    # The router, twice; what predicts and corrects; Laurel; what the block's input is made with.
    block = 2 * 10 * 3 + 3 * 9 + 3 * 3 + 2 * 10 * 4 + 2 * 10 * 5
    once = 4 * 10 * 10 + 10 * 3 * 5  # to copies and back; inputs of all blocks
    assert multiplying_parameters(more) == multiplying_parameters(CONFIG) + 3 * block + once


def test_narrow_vectors_that_keys_and_values_are_made_of_multiply_instead():
    narrow = dataclasses.replace(
        CONFIG, num_kv_heads=4, rotary_dim=2, value_dim=5, latent_dim=7, query_latent_dim=8
    )
    queries = 10 * 8 + 8 * 24
    keys_and_values = 10 * 7 + 10 * 2 + 7 * 4 * (4 + 5)
    block = queries + keys_and_values + 20 * 10 + 3 * 10 * 20
    assert multiplying_parameters(narrow) == 3 * block + 10 * 100
    matrices = 6 * multiplying_parameters(narrow)
    assert update_flops(narrow, rows=2, length=64) == 128 * (matrices + 6 * 4 * (6 + 5) * 3 * 64)


def test_linear_attention_multiplies_its_heads_matrices_and_sees_no_keys():
    linear = dataclasses.replace(
        CONFIG,
        linear_layers=(True, True, False),
        linear_key_heads=2,
        linear_value_heads=4,
        linear_key_dim=3,
        linear_value_dim=5,
        convolution=4,
        attention_gate=True,
    )
    # Queries, keys, values, gates, decays, rates; the output; taps of queries, keys and values.
    block = 10 * (6 + 6 + 20 + 20 + 4 + 4) + 20 * 10 + 4 * (6 + 6 + 20) + 3 * 10 * 20
    full = multiplying_parameters(CONFIG) + 10 * 24  # gates of attention's outputs
    usual = 10 * 24 + 2 * 10 * 12 + 24 * 10 + 3 * 10 * 20
    assert multiplying_parameters(linear) == full + 2 * (block - usual)
    matrices = 6 * multiplying_parameters(linear)
    attention = 12 * 24 * 64 + 2 * 18 * 4 * 3 * 5
    assert update_flops(linear, rows=2, length=64) == 128 * (matrices + attention)


def test_flops_of_an_update_count_only_keys_inside_the_window():
    windowed = dataclasses.replace(CONFIG, windows=(16, None, 1000))
    matrices = 6 * multiplying_parameters(CONFIG)
    assert update_flops(CONFIG, rows=2, length=64) == 128 * (matrices + 12 * 24 * 3 * 64)
    assert update_flops(windowed, rows=2, length=64) == 128 * (matrices + 12 * 24 * (16 + 64 + 64))


@pytest.mark.parametrize(
    ("kinds", "peak"),
    [
        (["NVIDIA H100 80GB HBM3"] * 2, 2 * 989e12),
        (["NVIDIA H100 PCIe"], 756e12),
        (["NVIDIA L4"], 121e12),
        (["NVIDIA L40S"], 362e12),
        (["TPU v5 lite"], 197e12),
        (["TPU v5"], 459e12),
        (["cpu"], None),
        (["TPU v4", "a device of next year"], None),
    ],
)
def test_the_peak_is_known_for_listed_kinds_of_devices_only(kinds, peak):
    assert peak_flops(devices(*kinds)) == peak


@pytest.fixture
def now(monkeypatch):
    """The time that `perf_counter` returns, in a list that tests change."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_the_clock_measures_updates_since_its_last_reading(now):
    clock = Clock(flops=5e3, peak=1e6)
    now[0] = 100.0  # not an update: the loop evaluates and saves
    clock.restart()
    for _ in range(2):
        now[0] += 0.05
        clock.add(tokens=30)
    assert clock.read() == {"step_seconds": 0.05, "tokens_per_second": 600.0, "mfu": 0.1}
    now[0] += 0.1
    clock.add(tokens=30)
    assert clock.read() == {"step_seconds": 0.1, "tokens_per_second": 300.0, "mfu": 0.05}


def test_without_a_known_peak_there_is_no_mfu(now):
    clock = Clock(flops=5e3, peak=None)
    now[0] += 0.1
    clock.add(tokens=1)
    assert clock.read().keys() == {"step_seconds", "tokens_per_second"}
