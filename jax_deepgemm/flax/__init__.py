"""Flax NNX layers on this package's products: `Linear`, `MoE`, frozen FP8 weights. Needs the extra `flax`."""

from __future__ import annotations

try:
    import flax.nnx as _nnx  # noqa: F401 - for the message
except ImportError as error:
    raise ImportError(
        "jax_deepgemm.flax needs Flax, which is not installed: pip install flax, or jax_deepgemm[flax]."
    ) from error

from jax_deepgemm.flax.accumulate import accumulate_gradients
from jax_deepgemm.flax.linear import Linear, SwiGLU
from jax_deepgemm.flax.moe import Load, MoE, RouterBias
from jax_deepgemm.flax.prepared import WeightCopies, prepared_weights
from jax_deepgemm.flax.variables import QuantizedParam, named_shardings, quantize_module
from jax_deepgemm.ops.quantize.serialization import register as _register

_register()

__all__ = [
    "Linear",
    "Load",
    "MoE",
    "QuantizedParam",
    "RouterBias",
    "SwiGLU",
    "WeightCopies",
    "accumulate_gradients",
    "named_shardings",
    "prepared_weights",
    "quantize_module",
]
