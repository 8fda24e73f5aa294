"""Makes frequencies.json: rotary frequencies as Hugging Face transformers computes them.

Run `python make.py` with an interpreter that has the reference extra. For each case and row length:
the fields of config.json, and for them `frequencies` [pairs] and `attention_factor`.
"""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LENGTHS = (512, 4096, 4097, 20000)
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.0 + i / 8 for i in range(16)]}
LONG["long_factor"] = [1.0 + i * i / 4 for i in range(16)]

CASES = {
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "yarn as Qwen writes it": {
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    },
    "yarn without the original length": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn without a factor": {
        "max_position_embeddings": 16384,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": None,
            "original_max_position_embeddings": 4096,
        },
    },
    "yarn as DeepSeek writes it": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    },
    "yarn as gpt-oss writes it": {
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    "yarn with an attention factor": {
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.5},
    },
    "yarn of half of each head": {
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0},
    },
    "longrope": {
        "rope_scaling": LONG | {"factor": 8.0, "original_max_position_embeddings": 4096},
    },
    "longrope as Phi-3 writes it": {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": LONG,
    },
    "longrope of three quarters of each head, as transformers 5 writes it": {
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0] * 12,
            "long_factor": [1.0 + i for i in range(12)],
            "original_max_position_embeddings": 4096,
        },
    },
    "longrope with an attention factor": {
        "max_position_embeddings": 131072,
        "rope_scaling": LONG | {"attention_factor": 1.25, "original_max_position_embeddings": 4096},
    },
}


def main() -> None:
    golden = []
    for name, extra in CASES.items():
        fields = {"max_position_embeddings": 4096, "rope_theta": 10000.0, **SIZES, **extra}
        for length in LENGTHS:
            config = LlamaConfig(**json.loads(json.dumps(fields)))
            kind = config.rope_parameters["rope_type"]
            found, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
            case = {"case": f"{name}, {length} tokens", "length": length, "fields": fields}
            case |= {"attention_factor": factor, "frequencies": found.tolist()}
            golden.append(case)
    lines = ",\n".join(json.dumps(case) for case in golden)
    (Path(__file__).parent / "frequencies.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
