"""Forward passes of Hugging Face transformers, for `benchmarks/forward.py`, which starts this.

It runs under an interpreter with torch: `python transformers_peer.py DIRECTORY DTYPE ROWS.npy
THREADS`. For each line on standard input it runs one forward pass and prints the seconds.
"""

import sys
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM

HEAD_CHUNK = 512


def main() -> None:
    directory, dtype, rows, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    tokens = torch.from_numpy(np.load(rows)).long()
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        # Without a mask, since each row is one document, torch uses its fused causal path.
        hidden = model.model(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
        tops = [model.lm_head(chunk).max(-1).values for chunk in hidden.split(HEAD_CHUNK)]
        float(torch.cat(tops).sum())
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
