"""A student of one's own learns from a cache in a loop of one's own, in PyTorch.

    python examples/torch_loop.py [CACHE] [--steps 200] [--rows 8] [--device cuda]

Needs torch (docs/pytorch.md). The student is a small transformer; any module that gives hidden
states and a matrix to multiply them by will do. Printed are the loss while it learns, and how it
does on held-out rows before and after.
"""

import argparse
import itertools

import torch
from torch import nn

import decant
import decant.torch


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x, mask):
        split = self.project(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Student(nn.Module):
    def __init__(self, vocabulary: int, length: int, *, width=128, blocks=4, heads=4):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.RMSNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, batch):
        """Hidden states [rows, positions, width], and the matrix that gives logits."""
        mask = decant.torch.attention_mask(batch["segment_ids"])  # a row holds several documents
        x = self.embedding(batch["tokens"]) + self.places(batch["positions"])
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x), self.embedding.weight


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", nargs="?", default="runs/cache")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    cache = decant.open_cache(options.cache)
    manifest = cache.manifest
    student = Student(manifest.vocabulary_size, manifest.sequence_length).to(options.device)
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-3)
    report(student, cache, options.device)
    batches = decant.torch.batches(cache, batch_rows=options.rows, epochs=None, seed=0)
    for step, batch in enumerate(itertools.islice(batches, options.steps), 1):
        batch = batch.to(options.device)
        hidden, unembedding = student(batch)
        loss, metrics = decant.torch.loss(hidden, unembedding, batch, return_metrics=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % max(1, options.steps // 5) == 0:
            print(f"step {step}: loss {loss:.3f}, KL {metrics['kl_loss']:.3f}")
    report(student, cache, options.device)


def report(student: Student, cache: decant.Cache, device: str) -> None:
    found = decant.torch.evaluate(student, cache, batch_rows=8, device=device)
    print(
        f"held out: KL {found['heldout_kl']:.3f} ({found['heldout_kl_by']}), cross-entropy "
        f"{found['heldout_ce']:.3f}, agreement {found['heldout_agreement']:.1%}"
    )


if __name__ == "__main__":
    main()
