"""Activations as a table, and in NumPy float64 as their sources have them (the package writes them another
way)."""

from __future__ import annotations

import numpy as np

from jax_deepgemm.activation import GPT_OSS, Activation

ACTIVATIONS = {
    "silu": Activation(),
    "silu interleaved": Activation(interleaved=True),
    "gelu": Activation("gelu"),
    "relu2": Activation("relu2"),
    "gpt-oss": GPT_OSS,
    "gpt-oss apart": GPT_OSS._replace(interleaved=False),
    "deepseek-v4": Activation(limit=10.0),
    "gelu clipped": Activation("gelu", limit=2.0, shift=-0.5),
}


def _function(x: np.ndarray, a: Activation) -> tuple[np.ndarray, np.ndarray]:
    """f(x) and its slope."""
    if a.function == "relu2":
        return np.maximum(x, 0) ** 2, 2 * np.maximum(x, 0)
    if a.function == "gelu":
        inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
        return x / 2 * (1 + np.tanh(inner)), (1 + np.tanh(inner)) / 2 + x / 2 * slope / np.cosh(inner) ** 2
    sigmoid = 1 / (1 + np.exp(-a.alpha * x))
    return x * sigmoid, sigmoid + a.alpha * x * sigmoid * (1 - sigmoid)


@np.errstate(over="ignore")
def activate(h: np.ndarray, a: Activation) -> tuple[np.ndarray, np.ndarray]:
    """act [.., i] of h [.., 2 i] or [.., i], and for each column of h the derivative of its feature's act."""
    h, limit = h.astype(np.float64), np.inf if a.limit is None else a.limit
    if a.function == "relu2":
        return _function(h, a)
    i = h.shape[-1] // 2
    gates = np.arange(0, 2 * i, 2) if a.interleaved else np.arange(i)
    ups = gates + (1 if a.interleaved else i)
    gate, up = h[..., gates], h[..., ups]
    value, slope = _function(np.minimum(gate, limit), a)
    factor = np.clip(up, -limit, limit) + a.shift
    partials = np.zeros_like(h)
    partials[..., gates] = factor * slope * (gate <= limit)
    partials[..., ups] = value * (abs(up) <= limit)
    return value * factor, partials


def repeated(dact: np.ndarray, a: Activation) -> np.ndarray:
    """For each column of h the column of act [.., i] that it belongs to."""
    if a.function == "relu2":
        return dact
    return np.repeat(dact, 2, axis=-1) if a.interleaved else np.concatenate([dact, dact], axis=-1)
