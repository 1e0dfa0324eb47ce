"""What MoE layers are compared with: loops over tokens and experts in NumPy float64, and plain jnp."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.shared.arrays import normal as normal


def wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def relative(got: Any, want: Any) -> float:
    """|got - want| / |want|, Euclidean."""
    got, want = wide(got), wide(want)
    assert got.shape == want.shape
    size = np.linalg.norm(want)
    return float(np.linalg.norm(got - want) / size) if size else float(np.linalg.norm(got))


def pull(function: Any, *args: Any, by: Any) -> tuple[Any, ...]:
    """(function(*args), and its arguments' gradients for this gradient of the result), in one program."""

    return jax.jit(functools.partial(pull_stepwise, function))(*args, by=by)


def pull_stepwise(function: Any, *args: Any, by: Any) -> tuple[Any, ...]:
    """The same without jit: XLA compiles each op once for all layers that have it."""
    y, vjp = jax.vjp(function, *args)
    return y, *vjp(by)


def random_ids(seed: int, tokens: int, top_k: int, experts: int, dropped: float = 0.0) -> jax.Array:
    """Distinct experts for each token; a share of the copies is -1."""
    rng = np.random.default_rng(seed)
    ids = (
        np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
        if tokens
        else np.zeros((0, top_k))
    )
    return jnp.asarray(np.where(rng.random(ids.shape) < dropped, -1, ids), jnp.int32)


def route(
    logits: np.ndarray,
    top_k: int,
    score: str = "softmax",
    num_groups: int = 1,
    top_groups: int = 1,
    bias: np.ndarray | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """The router as a loop. Sorting is stable, so that ties go to the lower id."""
    if score == "softmax":
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores = scores / scores.sum(-1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits))
    all_ids, all_weights = [], []
    for row in scores:
        chosen_by = row + (0 if bias is None else bias)
        groups = chosen_by.reshape(num_groups, -1)
        power = np.sort(groups, axis=1)[:, -2:].sum(1)
        best = np.argsort(-power, kind="stable")[:top_groups]
        size = groups.shape[1]
        allowed = [e for e in range(len(row)) if e // size in best]
        ids = sorted(allowed, key=lambda e: (-chosen_by[e], e))[:top_k]
        weights = row[ids]
        all_ids.append(ids)
        all_weights.append(scale * (weights / weights.sum() if renormalize else weights))
    return np.array(all_ids), np.array(all_weights)


def moe_float64(x: Any, ids: Any, weights: Any, w13: Any, w2: Any) -> np.ndarray:
    """Every token through its experts, one after the other."""
    x, weights, w13, w2 = map(wide, (x, weights, w13, w2))
    out = np.zeros((x.shape[0], w2.shape[1]))
    for token, slot in np.ndindex(*np.shape(ids)):
        expert = int(ids[token, slot])
        if 0 <= expert < len(w13):
            gate, up = np.split(w13[expert] @ x[token], 2)
            out[token] += weights[token, slot] * (w2[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return out


def moe_plain(x: jax.Array, ids: jax.Array, weights: jax.Array, w13: jax.Array, w2: jax.Array) -> jax.Array:
    """All experts on all tokens in float32, for autodiff."""
    x, w13, w2 = (z.astype(jnp.float32) for z in (x, w13, w2))
    gate, up = jnp.split(jnp.einsum("th,enh->ten", x, w13, precision="highest"), 2, axis=-1)
    y = jnp.einsum("tei,ehi->teh", jax.nn.silu(gate) * up, w2, precision="highest")
    share = jnp.sum(jax.nn.one_hot(ids, w13.shape[0]) * weights[..., None], axis=1)
    return jnp.einsum("teh,te->th", y, share, precision="highest")
