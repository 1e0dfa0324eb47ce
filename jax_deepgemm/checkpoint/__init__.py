"""Checkpoints of quantised models: safetensors files, read without torch, and weights made of them."""

from jax_deepgemm.checkpoint.files import Checkpoint, save_safetensors, save_sharded
from jax_deepgemm.checkpoint.load import load_quantized
from jax_deepgemm.checkpoint.names import Weight, hugging_face_names

__all__ = [
    "Checkpoint",
    "Weight",
    "hugging_face_names",
    "load_quantized",
    "save_safetensors",
    "save_sharded",
]
