"""Decoder-only transformers in Flax NNX: families, weights in and out, sharding rules."""

from models.checkpoint import Checkpoint, open_checkpoint, save_directory
from models.config import ModelConfig
from models.decoder import Decoder

__all__ = ["Checkpoint", "Decoder", "ModelConfig", "open_checkpoint", "save_directory"]
