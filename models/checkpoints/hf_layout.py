"""Names of the files in a Hugging Face model directory."""

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
"""Where the weights are in several files: which file holds each tensor."""
