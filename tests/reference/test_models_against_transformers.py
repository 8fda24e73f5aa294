"""SmolLM2-135M from its GGUF file against Hugging Face transformers, in float32 on real text.

Needs an interpreter with torch and transformers, which DECANT_REFERENCE_PYTHON names (default:
this one); `make reference` installs them. With `-s` it prints the figures.

Transformers reads the .gguf file itself and runs every document *alone*; we run the documents
packed in rows. So agreement shows that dequantisation, model and packing are all right.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from decant.models import open_checkpoint, save_directory
from decant.models.numerics import logits

pytestmark = pytest.mark.reference

PYTHON = os.environ.get("DECANT_REFERENCE_PYTHON", sys.executable)
LENGTH, K = 1024, 64
# Lengths of the documents in each row; the rest of a row is padding.
ROWS = ((500, 300, 200), (1024,), (350, 1, 640))
FILES = (
    *("argparse.py", "ast.py", "bisect.py", "calendar.py", "copy.py", "csv.py", "dis.py"),
    *("heapq.py", "json/decoder.py", "statistics.py", "textwrap.py", "this.py"),
)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our results and those of transformers, the documents one after another."""
    probe = "import torch, transformers, regex, gguf"
    if subprocess.run([PYTHON, "-c", probe], capture_output=True).returncode:
        pytest.skip(f"{PYTHON} has no torch and transformers: `make reference` installs them.")
    directory = tmp_path_factory.mktemp("reference")
    checkpoint = open_checkpoint("embedded")
    tokenizer, model = checkpoint.tokenizer(), checkpoint.load()
    library = Path(os.__file__).parent
    texts = [(library / name).read_text("utf-8") for name in FILES]
    encoded = tokenizer.encode_batch(texts)
    lengths = [n for row in ROWS for n in row]
    long_enough = [ids for ids in encoded if len(ids) >= max(lengths)]
    documents = [ids[:n] for ids, n in zip(long_enough, lengths, strict=False)]
    assert len(documents) == len(lengths)

    save_directory(model, directory / "export", tokenizer.files())
    np.savez(directory / "documents.npz", *documents)
    (directory / "texts.json").write_text(json.dumps(texts))
    script = Path(__file__).with_name("transformers_side.py")
    subprocess.run([PYTHON, script, checkpoint.path, directory], check=True)

    logprobs, hidden = ours_packed(model, documents)
    return {
        "logprobs": logprobs,
        "hidden": hidden,
        "their_logprobs": np.load(directory / "logprobs.npy", mmap_mode="r"),
        "their_hidden": np.load(directory / "hidden.npy", mmap_mode="r"),
        "ids": [ids.tolist() for ids in encoded],
        "report": json.loads((directory / "report.json").read_text()),
    }


def ours_packed(model, documents):
    """Log-probs [N, V] and hidden states [L + 1, N, D] of the documents, packed into ROWS."""
    tokens, segments, positions = (np.zeros((len(ROWS), LENGTH), np.int32) for _ in range(3))
    waiting = iter(documents)
    for row, lengths in enumerate(ROWS):
        start = 0
        for segment, length in enumerate(lengths, 1):
            at = np.s_[row, start : start + length]
            tokens[at], segments[at], positions[at] = next(waiting), segment, np.arange(length)
            start += length
    layers = tuple(range(model.config.num_layers + 1))
    forward = nnx.jit(lambda m, *rows: m(*rows, hidden_layers=layers)[1])
    chosen = forward(model, tokens, segments, positions)
    real = segments > 0
    hidden = np.stack([np.asarray(chosen[layer])[real] for layer in layers])

    @nnx.jit
    def head(model, states):
        return jnp.asarray(nnx.log_softmax(logits(states, model.unembedding(), softcap=None)))

    parts = np.array_split(hidden[-1], 8)
    return np.concatenate([np.asarray(head(model, part)) for part in parts]), hidden


def test_log_probabilities_differ_by_less_than_5e_4(both):
    ours, theirs = both["logprobs"], both["their_logprobs"]
    assert len(ours) >= 2000
    worst = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
    print(f"\n{len(ours)} tokens: max |Δ log-prob| {worst:.2e}")
    assert worst <= 5e-4


def test_the_64_most_likely_tokens_are_the_same_set_everywhere_in_the_same_order(both):
    same_sets, ties, same_rank, total = 0, 0, 0, 0
    for ours, theirs in zip(both["logprobs"], both["their_logprobs"], strict=True):
        mine = np.argsort(-ours, kind="stable")[:K]
        other = np.argsort(-theirs, kind="stable")[:K]
        same_rank += (mine == other).sum()
        total += K
        if set(mine) == set(other):
            same_sets += 1
        else:
            # The 64th and 65th are closer than the two programs' rounding can tell apart.
            edge = np.sort(theirs)[::-1][K - 1 : K + 1]
            ties += int(edge[0] - edge[1] <= 2 * np.abs(ours - theirs).max())
    different = len(both["logprobs"]) - same_sets
    print(
        f"\nsets equal at {same_sets} of {len(both['logprobs'])}; {ties} of {different} others are"
    )
    print(f"ties within rounding; equal by rank {same_rank / total:.4%}")
    assert different == ties <= 2
    assert same_rank / total >= 0.999


def test_hidden_states_of_every_layer_are_within_1e_3(both):
    ours, theirs = both["hidden"], both["their_hidden"]
    assert ours.shape == theirs.shape
    norms = np.linalg.norm(theirs, axis=-1)
    error = (np.linalg.norm(ours - theirs, axis=-1) / norms).max(-1)
    print(f"\nlargest relative error of a layer {error.max():.2e} (layer {error.argmax()})")
    assert (error <= 1e-3).all()


def test_token_ids_are_those_of_transformers_and_of_the_rule_written_out(both):
    report = both["report"]
    print(f"\n{sum(map(len, both['ids']))} ids of {len(both['ids'])} files")
    assert both["ids"] == report["ids"]
    assert both["ids"] == report["written_out"]


def test_transformers_loads_what_we_export_bit_for_bit(both):
    report = both["report"]
    assert report["names"]
    assert report["unequal"] == []
    assert report["same_logits"]
