"""PEFT makes adapters and loads ours; needs torch, transformers and peft.

`python peft_side.py DIRECTORY`. DIRECTORY holds a model (`base/`), an adapter on it that we wrote
(`ours/`) and `tokens.npy`. The script writes there an adapter of each kind in `KINDS`, and
logits.npz with the logits of each of them and, of ours, as PEFT and as transformers load it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

KINDS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    "root": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "o_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {r"layers\.\d+\.self_attn\.v_proj": 1, "proj": 5},
    },
    "saved module": {
        "r": 2,
        "target_modules": ["k_proj"],
        "modules_to_save": ["lm_head"],
        "layers_to_transform": [1],
    },
}


def main() -> None:
    directory = Path(sys.argv[1])
    torch.manual_seed(0)
    tokens = torch.from_numpy(np.load(directory / "tokens.npy")).long()

    def base():
        return AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)

    @torch.no_grad()
    def logits(model):
        return model.eval()(tokens).logits.numpy()

    found = {"base": logits(base())}
    for name, fields in KINDS.items():
        model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **fields))
        for path, parameter in model.named_parameters():
            if "lora_B" in path or "modules_to_save" in path:
                torch.nn.init.normal_(parameter.data, std=0.2)
        found[name] = logits(model)
        model.save_pretrained(directory / name)
    found["ours by peft"] = logits(PeftModel.from_pretrained(base(), directory / "ours"))
    found["ours by transformers"] = logits(
        AutoModelForCausalLM.from_pretrained(directory / "ours", dtype=torch.float32)
    )
    np.savez(directory / "logits.npz", **found)


if __name__ == "__main__":
    main()
