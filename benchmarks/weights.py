"""Host memory while a teacher's weights are loaded, and the error of int8 weights.

    python -m benchmarks.weights [--layers 12] [--width 1024] [--devices 8] [--rows 8]

Loading: a random bfloat16 checkpoint is loaded onto simulated CPU devices, each mesh in a process
of its own. `peak` is the growth of the process's anonymous memory at its largest. It includes the
simulated devices' shares, and not mapped files, whose memory the system can take back. `at once` is
the loader of release 0.3: every parameter whole on the host, then placed.
int8: KL at T = 1 from the embedded teacher with float32 weights to the one with int8 weights, on
source text of Python's standard library; bfloat16 is shown for comparison.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.capture import real_rows
from decant.models import Decoder, ModelConfig, open_checkpoint, save_directory
from decant.models.mesh.sharding import parameter_shardings, teacher_mesh
from decant.models.numerics import logits
from decant.models.parameters import parameters_by_path

KINDS = (("none", "share by share"), ("none", "at once"), ("int8", "share by share"))


def main():
    options = _arguments()
    if options.child:
        return print(json.dumps(peak_of(Path(options.child), *json.loads(options.mesh))))
    console = Console()
    table = Table("mesh", "weights", "loader", "devices' shares, MB", "peak, MB", "peak ÷ shares")
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory), layers=options.layers, width=options.width)
        n = options.devices
        for data, tensor in ((1, 1), (1, n), (n // 4, 4)):
            for quantize, loader in KINDS:
                shares, peak = _child(directory, (data, tensor, quantize, loader), devices=n)
                mb = (f"{x / 1e6:,.0f}" for x in (shares, peak))
                table.add_row(f"({data}, {tensor})", quantize, loader, *mb, f"{peak / shares:.2f}")
    console.print(table)
    console.print(divergences(rows=options.rows))


def write(path: Path, *, layers: int, width: int) -> None:
    """Write a random bfloat16 checkpoint with Llama's proportions."""
    config = ModelConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_layers=layers,
        num_heads=width // 64,
        num_kv_heads=width // 128,
        head_dim=64,
    )
    model = Decoder(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    save_directory(model, path, {})


def peak_of(path: Path, data: int, tensor: int, quantize: str, loader: str) -> tuple[int, int]:
    """Bytes of the devices' shares, and the process's peak memory growth while loading them."""
    checkpoint, mesh = open_checkpoint(path), teacher_mesh(data=data, tensor=tensor)
    jax.block_until_ready(jnp.ones(8))
    before, done, seen = _anonymous(), threading.Event(), [0]

    def watch():
        while not done.is_set():
            seen[0] = max(seen[0], _anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if loader == "at once":
        model = checkpoint.load(dtype="bfloat16")
        for place, parameter in zip(
            parameter_shardings(model, mesh).values(),
            parameters_by_path(model).values(),
            strict=True,
        ):
            parameter.set_value(jax.device_put(parameter.get_value(), place))
    else:
        model = checkpoint.load(dtype="bfloat16", quantize=quantize, mesh=mesh)
    arrays = [parameter.get_value() for parameter in parameters_by_path(model).values()]
    jax.block_until_ready(arrays)
    done.set()
    watcher.join()
    shares = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    return shares, max(seen[0], _anonymous()) - before


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon on this system")


def _child(directory: str, arguments: tuple, *, devices: int) -> tuple[int, int]:
    environment = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path.cwd()),
        "PATH": "",
    }
    command = [sys.executable, "-m", "benchmarks.weights", "--child", directory]
    done = subprocess.run(
        [*command, "--mesh", json.dumps(arguments)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def divergences(*, rows: int) -> Table:
    """KL from the embedded teacher with float32 weights to the one with other weights."""
    checkpoint = open_checkpoint("embedded")
    batch = real_rows("embedded", length=256, count=rows)
    inputs = [
        np.stack([getattr(row, name) for row in batch])
        for name in ("tokens", "segment_ids", "positions")
    ]
    scored = np.stack([row.loss_mask for row in batch])

    def logp(**settings) -> np.ndarray:
        model = checkpoint.load(**settings)
        hidden = jax.jit(lambda m, *x: m(*x)[0])(model, *inputs)[scored].astype(jnp.float32)
        matrix = model.unembedding().astype(jnp.float32)
        scores = logits(hidden, matrix, softcap=model.config.final_softcap)
        return np.asarray(jax.nn.log_softmax(scores, axis=-1), np.float64)

    exact = logp()
    table = Table("weights", "operands", "KL mean", "p99", "same first id")
    for weights, settings in (
        ("bfloat16", {"dtype": "bfloat16"}),
        ("int8", {"quantize": "int8"}),
        ("int8", {"quantize": "int8", "dtype": "bfloat16"}),
    ):
        other = logp(**settings)
        kl = (np.exp(exact) * (exact - other)).sum(-1)
        same = (exact.argmax(-1) == other.argmax(-1)).mean()
        figures = (f"{kl.mean():.1e}", f"{np.quantile(kl, 0.99):.1e}", f"{same:.1%}")
        table.add_row(weights, settings.get("dtype", "float32"), *figures)
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--mesh", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
