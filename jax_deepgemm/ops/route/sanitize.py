"""Calls for compute-sanitizer: routing and its gradient, of rows that take both ways through the choice."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.ops.route.api import DEEPSEEK_V3, route

TOKENS = 37
FORMS: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (6, 2, {}),
    (60, 4, {"score": "sigmoid"}),
    (100, 5, {"score": None, "num_groups": 4, "top_groups": 3}),
    (256, 8, dict(DEEPSEEK_V3)),
    (2047, 32, {"score": "sqrt_softplus"}),
)
"""Experts that fill no lanes, those that do, groups, and the most that there are."""


def cases() -> Iterator[Case]:
    """Yields a choice and a gradient of each form."""
    for experts, top_k, options in FORMS:
        x = np.random.default_rng(0).normal(size=(TOKENS, experts)).astype(np.float32)
        x[::3] = np.sort(np.abs(x[::3]))
        x[1::3] = 0.5
        loss = functools.partial(_loss, top_k, options)
        name = f"route {experts} top {top_k}"
        yield Case(name, functools.partial(_weights, top_k, options), (jnp.asarray(x),))
        yield Case(f"{name} gradient", jax.grad(loss), (jnp.asarray(np.abs(x), jnp.bfloat16),))


def _weights(top_k: int, options: dict[str, Any], logits: jax.Array) -> jax.Array:
    bias = jnp.arange(logits.shape[1], dtype=jnp.float32) % 3
    return route(logits, top_k, bias=bias, **options)[1]


def _loss(top_k: int, options: dict[str, Any], logits: jax.Array) -> jax.Array:
    return jnp.sum(route(logits, top_k, **options)[1] * jnp.arange(1.0, top_k + 1))
