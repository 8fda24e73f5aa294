"""The other side of `benchmarks/forward.py`: Hugging Face transformers in its own process.

Run by an interpreter that has torch: `python transformers_peer.py DIRECTORY DTYPE ROWS.npy`.
Each line on standard input asks for one forward pass; the answer is its seconds.
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
        # No mask: each row is one document, which lets torch take its fused causal path.
        hidden = model.model(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
        tops = [model.lm_head(chunk).max(-1).values for chunk in hidden.split(HEAD_CHUNK)]
        float(torch.cat(tops).sum())
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
