"""What an epilogue makes of sums, in NumPy and float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from jax_deepgemm.activation import GPT_OSS, Activation

ACTIVATIONS = (
    None,
    "silu",
    "gelu",
    "relu2",
    "swiglu",
    "geglu",
    Activation("silu", interleaved=True),
    Activation("gelu", interleaved=True),
    GPT_OSS,
)
_GATES = {"swiglu": Activation("silu"), "geglu": Activation("gelu")}


def _each(x: np.ndarray, function: str, alpha: float) -> np.ndarray:
    if function == "relu2":
        return np.maximum(x, 0) ** 2
    if function == "gelu":
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x / (1 + np.exp(-alpha * x))


def with_epilogue(sums: np.ndarray, alpha: float, bias: Any, activation: Any, c: Any = None) -> np.ndarray:
    """activation(alpha * sums + bias) + c."""
    x = alpha * sums + np.asarray(bias, np.float64)
    if isinstance(activation, str) and activation not in _GATES:
        x = _each(x, activation, 1.0)
    elif activation is not None:
        how = _GATES[activation] if isinstance(activation, str) else activation
        gate, up = (x[:, 0::2], x[:, 1::2]) if how.interleaved else np.split(x, 2, axis=1)
        if how.limit is not None:
            gate, up = np.minimum(gate, how.limit), np.clip(up, -how.limit, how.limit)
        x = _each(gate, how.function, how.alpha) * (up + how.shift)
    return x if c is None else x + np.asarray(c).astype(np.float64)
