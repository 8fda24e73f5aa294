"""Processor time and memory of decant.torch's fused loss, against the dense formula; rows a second.

    python -m benchmarks.torch_head [--tokens 1024] [--width 576] [--vocabulary 49152] [--k 32]
                                    [--cache runs/cache]

Each way runs in a process of its own, forward and backward, on random targets. Memory is the
process's peak above that before the loss. Needs torch. `--cache` also reads rows of a cache.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time

RANK = 32
TAILS = ("bucket", "counts", "sketch", "sampled", "prior")
WAYS = ("dense", *(f"fused, {tail}" for tail in TAILS), "cross-entropy")


def main():
    options = _arguments()
    print(f"N={options.tokens} D={options.width} V={options.vocabulary} k={options.k} float32")
    context = multiprocessing.get_context("spawn")
    for way in WAYS:
        with context.Pool(1) as pool:
            seconds, memory = pool.apply(measure, (way, options))
        print(f"{way:16} {1e3 * seconds:7.0f} ms  {memory / 2**20:6.0f} MiB")
    if options.cache:
        for workers in (0, 1):
            speed = rows_a_second(options.cache, workers)
            print(f"DataLoader, {workers} workers: {speed:.0f} rows/s")


def measure(way, options):
    """Median processor seconds of three runs after a first, and the peak of memory in bytes."""
    import torch

    import decant.torch

    torch.manual_seed(0)
    rows, length = 2, options.tokens // 2
    hidden = torch.randn(rows, length, options.width, requires_grad=True)
    matrix = (torch.randn(options.vocabulary, options.width) / options.width**0.5).requires_grad_()
    batch = _batch(rows, length, options)
    prior = torch.randn(7, options.vocabulary).log_softmax(-1)
    tables = torch.randn(RANK, options.vocabulary), torch.randn(1, options.vocabulary), None
    sketch = decant.torch.SketchTables(*tables)

    def run():
        if way == "dense":
            return dense(hidden @ matrix.T, batch)
        if way == "cross-entropy":
            logits = (hidden @ matrix.T).flatten(0, 1)
            return torch.nn.functional.cross_entropy(logits, batch["labels"].flatten())
        tail = way.removeprefix("fused, ")
        return decant.torch.loss(
            hidden,
            matrix,
            batch,
            tail=tail,
            prior=prior if tail == "prior" else None,
            sketch=sketch if tail == "sketch" else None,
        )

    before, seconds = _peak(), []
    for _ in range(4):
        start = time.process_time()
        run().backward()
        seconds.append(time.process_time() - start)
        hidden.grad = matrix.grad = None
    return statistics.median(seconds[1:]), _peak() - before


def dense(logits, batch, *, alpha=0.9):
    """The loss with tail = "bucket" at T = 1 on all logits, differentiated by torch."""
    import torch

    logq = torch.log_softmax(logits, -1)
    ids = batch["topk_ids"].long()
    logp, mass = batch["topk_logprobs"], batch["tail_logmass"][..., -1]
    tail = logq.scatter(-1, ids, -torch.inf).logsumexp(-1)
    kl = (logp.exp() * (logp - logq.gather(-1, ids))).sum(-1) + mass.exp() * (mass - tail)
    ce = -logq.gather(-1, batch["labels"][..., None])[..., 0]
    return (alpha * kl + (1 - alpha) * ce).mean()


def rows_a_second(path, workers, *, rows=64):
    """Rows a second through a DataLoader in batches of eight, without the start of its workers."""
    import decant.torch

    batches = iter(decant.torch.batches(path, batch_rows=8, epochs=None, workers=workers))
    next(batches)
    start = time.perf_counter()
    for _ in range(rows // 8):
        next(batches)
    return rows / (time.perf_counter() - start)


def _batch(rows, length, options):
    import torch

    shape = (rows, length)
    count = options.k + 16
    ids = torch.stack([torch.randperm(options.vocabulary)[:count] for _ in range(rows * length)])
    ids = ids.reshape(*shape, count).int()
    logprobs = torch.randn(*shape, options.k + 1).log_softmax(-1)
    logprobs[..., :-1] = logprobs[..., :-1].sort(-1, descending=True).values
    mass = torch.linspace(torch.tensor(float(options.vocabulary)).log().item(), 0, 7)
    return {
        "labels": torch.randint(options.vocabulary, shape),
        "loss_mask": torch.ones(shape, dtype=torch.bool),
        "topk_ids": ids[..., : options.k],
        "topk_logprobs": logprobs[..., :-1],
        "tail_logmass": mass + logprobs[..., -1:],
        "tail_ids": ids[..., options.k :],
        "tail_logprobs": torch.full((*shape, 16), -12.0),
        "tail_logweights": torch.full((*shape, 16), 7.0),
        "count_ids": torch.randint(options.vocabulary, (*shape, 50), dtype=torch.int32),
        "counts": torch.ones((*shape, 50), dtype=torch.int32),
        "sketch": torch.randn(*shape, RANK),
        "sketch_basis": torch.zeros(rows, dtype=torch.int32),
    }


def _peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _arguments():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sizes = {"tokens": 1024, "width": 576, "vocabulary": 49152, "k": 32}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cache")
    return parser.parse_args()


if __name__ == "__main__":
    main()
