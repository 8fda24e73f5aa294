"""Hugging Face transformers runs the same weights on the same text; needs torch.

`python transformers_side.py MODEL.gguf DIRECTORY`. DIRECTORY holds our export of that file
(`export/`), `documents.npz` (token ids) and `texts.json`. The script writes there logprobs.npy and
hidden.npy, for which each document is run alone, and report.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
import regex
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    gguf, directory = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    documents = list(np.load(directory / "documents.npz").values())
    logprobs, hidden = zip(*(run_alone(model, ids) for ids in documents), strict=True)
    np.save(directory / "logprobs.npy", np.concatenate(logprobs))
    np.save(directory / "hidden.npy", np.concatenate(hidden, axis=1))

    exported = AutoModelForCausalLM.from_pretrained(directory / "export", dtype=torch.float32)
    theirs, ours = model.state_dict(), exported.eval().state_dict()
    tokenizer = AutoTokenizer.from_pretrained(directory / "export")
    texts = json.loads((directory / "texts.json").read_text())
    report = {
        "names": sorted(theirs) == sorted(ours),
        "unequal": [n for n in theirs if not torch.equal(theirs[n], ours[n])],
        "same_logits": bool(np.array_equal(run_alone(exported, documents[0])[0], logprobs[0])),
        "ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        "written_out": [byte_pair_ids(text, directory / "export") for text in texts],
    }
    (directory / "report.json").write_text(json.dumps(report))


def run_alone(model, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs [T, V] and hidden states [L + 1, T, D] of one document in a row of its own."""
    out = model(torch.from_numpy(ids).long()[None], output_hidden_states=True)
    logprobs = torch.log_softmax(out.logits[0].float(), -1)
    return logprobs.numpy(), torch.stack(out.hidden_states)[:, 0].numpy()


# SmolLM2's rule, as in llama.cpp: split off every digit, then apply GPT-2's expression.
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def byte_pair_ids(text: str, directory: Path) -> list[int]:
    """Byte-level BPE without a tokenizer library; special tokens are not recognised."""
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    rank = {tuple(pair): i for i, pair in enumerate(model["merges"])}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    ids: list[int] = []
    for piece in regex.split(r"(\p{N})", text):
        for word in WORDS.findall(piece):
            parts = [letter[b] for b in word.encode()]
            while len(parts) > 1:
                best = min(
                    range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), 1e9)
                )
                if (parts[best], parts[best + 1]) not in rank:
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            ids += [model["vocab"][part] for part in parts]
    return ids


if __name__ == "__main__":
    main()
