"""Completions against whole forward passes over the finished rows, on one device and on eight."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from decant.models.mesh.sharding import student_mesh
from decant.trainer.results.sampling import Request, Sampler, Sampling, likeliest
from tests.formulas.dense import log_softmax
from tests.trainer.update.test_step import student

PROMPTS = [[5, 9, 300], [7] * 12, [400, 3], [1, 2, 3, 4, 5]]
REQUESTS = [Request(ids, number, 0) for number, ids in enumerate(PROMPTS)]


@cache  # of what is compiled
def sampler(*, stop=(), vocabulary=512, **sampling):
    graph, params = student()
    return Sampler(
        graph,
        params,
        sampling=Sampling(**{"max_tokens": 6, **sampling}),
        vocabulary=vocabulary,
        stop=stop,
        batch_rows=4,
        mesh=student_mesh(devices=jax.devices()[:1]),
    )


@cache
def states_and_head():
    """A function of a row's ids that gives its final states, and the head."""
    graph, params = student()

    @jax.jit
    def states(row):
        return nnx.merge(graph, params)(row, jnp.ones_like(row), jnp.arange(row.size)[None])[0]

    return states, np.asarray(nnx.merge(graph, params).unembedding(), np.float64)


def whole_pass(ids):
    """Logits [position, vocab] of a row, in float64 after the states."""
    states, head = states_and_head()
    # Attention is causal, so the zeros after the row do not matter.
    padded = np.array([[*ids, *[0] * (32 - len(ids))]], np.int32)
    return np.asarray(states(padded)[0, : len(ids)], np.float64) @ head


def test_greedy_tokens_are_the_likeliest_and_their_logprobs_those_of_the_whole_row():
    requests = [*REQUESTS, Request([8] * 20, 4, 0)]  # the last one is a batch of another shape
    for request, made in zip(requests, sampler(temperature=0.0).complete(requests), strict=True):
        expected = log_softmax(whole_pass([*request.ids, *made.ids]))[len(request.ids) - 1 : -1]
        np.testing.assert_array_equal(made.ids, expected.argmax(-1))
        logprobs = expected[np.arange(6), made.ids]
        np.testing.assert_allclose(made.logprobs, logprobs, atol=1e-5)


def test_however_a_token_is_drawn_its_logprob_is_that_at_temperature_1_over_all_tokens():
    drawn = sampler(temperature=2.0, top_p=0.5).complete(REQUESTS[:2])
    for request, made in zip(REQUESTS[:2], drawn, strict=True):
        expected = log_softmax(whole_pass([*request.ids, *made.ids]))[len(request.ids) - 1 : -1]
        logprobs = expected[np.arange(6), made.ids]
        np.testing.assert_allclose(made.logprobs, logprobs, atol=1e-5)


def test_a_completion_does_not_depend_on_the_rest_of_its_batch():
    together = sampler().complete(REQUESTS)
    for request, expected in zip(reversed(REQUESTS), reversed(together), strict=True):
        (alone,) = sampler().complete([request])
        np.testing.assert_array_equal(alone.ids, expected.ids)
        np.testing.assert_array_equal(alone.logprobs, expected.logprobs)


def test_another_seed_prompt_or_sample_is_another_draw():
    def ids(request, **sampling):
        (made,) = sampler(**sampling).complete([request])
        return made.ids.tolist()

    first = ids(Request(PROMPTS[0], 0, 0))
    assert ids(Request(PROMPTS[0], 0, 0), seed=2) != first
    assert ids(Request(PROMPTS[0], 0, 1)) != first
    assert ids(Request(PROMPTS[0], 1, 0)) != first


def test_a_completion_ends_with_the_first_token_that_stops_it():
    (whole,) = sampler(temperature=0.0).complete(REQUESTS[:1])
    stop = int(whole.ids[2])
    (short,) = sampler(temperature=0.0, stop=(stop,)).complete(REQUESTS[:1])
    end = whole.ids.tolist().index(stop) + 1
    assert short.ids.tolist() == whole.ids[:end].tolist()
    assert len(short.logprobs) == end


def test_ids_above_the_tokenizers_do_not_exist():
    (whole,) = sampler(temperature=0.0, max_tokens=1).complete(REQUESTS[:1])
    last = int(whole.ids[0])
    (cut,) = sampler(temperature=0.0, max_tokens=1, vocabulary=last).complete(REQUESTS[:1])
    expected = log_softmax(whole_pass(PROMPTS[0])[-1, :last])
    assert cut.ids[0] == expected.argmax()
    assert cut.logprobs[0] == pytest.approx(expected.max(), abs=1e-5)


def test_top_p_keeps_the_fewest_likeliest_tokens():
    p = np.array([0.05, 0.4, 0.25, 0.2, 0.1])
    kept_by = {1.0: [0, 1, 2, 3, 4], 0.8: [1, 2, 3], 0.64: [1, 2], 0.3: [1], 1e-6: [1]}
    for top_p, kept in kept_by.items():
        found = np.asarray(likeliest(jnp.log(p)[None] + 3, top_p))[0]
        assert np.flatnonzero(found).tolist() == kept


SCRIPT = """
import json, jax
from flax import nnx
from decant.models.mesh.sharding import place_parameters, student_mesh
from decant.trainer.results.sampling import Sampler, Sampling
from decant.trainer.run.student_parameters import graph_and_parameters
from tests.trainer.results.test_sampling import REQUESTS
from tests.trainer.update.test_step import student
made = {}
for data, fsdp, tensor in ((1, 1, 1), (1, 8, 1), (2, 1, 4), (1, 2, 4)):
    devices = jax.devices()[:data * fsdp * tensor]
    mesh = student_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)
    model = nnx.merge(*student())
    place_parameters(model, mesh)
    sampler = Sampler(*graph_and_parameters(model), sampling=Sampling(6), vocabulary=512, stop=(),
                      batch_rows=4, mesh=mesh)
    found = sampler.complete(REQUESTS)
    made[f"{data} {fsdp} {tensor}"] = [[c.ids.tolist(), c.logprobs.tolist()] for c in found]
print(json.dumps(made))
"""


@pytest.mark.slow
def test_eight_devices_write_what_one_does():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    # Fewer threads than devices deadlock in a collective.
    more = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": "32"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **more, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    one = made.pop("1 1 1")
    for name, found in made.items():
        for (ids, logprobs), (expected, theirs) in zip(found, one, strict=True):
            assert ids == expected, name
            np.testing.assert_allclose(logprobs, theirs, atol=1e-5)
