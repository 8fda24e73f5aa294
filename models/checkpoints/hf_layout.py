"""Names of the files in a Hugging Face model directory."""

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
"""Where the weights are in several files: which file holds each tensor."""
ADAPTER_CONFIG = "adapter_config.json"
"""A PEFT directory has this file, and an adapter's matrices in place of a model's weights."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
