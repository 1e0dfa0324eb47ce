"""Routers, logits that are hard to rank, and a router as a loop in float64: CPU and GPU tests share them."""

from __future__ import annotations

from typing import Any

import numpy as np

from jax_deepgemm.ops.route.router import Router

LOWEST = float(np.nextafter(np.finfo(np.float32).min, np.float32(0)))


def hard_rows(seed: int, tokens: int, experts: int) -> np.ndarray:
    """Rows of spread logits, and in between equal ones, sorted ones, few values, zeros of both signs, and
    numbers that are none."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, experts)).astype(np.float32) * 3
    kinds = (
        lambda row: np.full_like(row, 0.5),
        np.sort,
        lambda row: np.sort(row)[::-1],
        np.round,
        lambda row: np.where(rng.random(experts) < 3 / experts, np.nan, row),
        lambda row: np.full_like(row, np.nan),
        lambda row: np.full_like(row, -np.inf),
        lambda row: np.where(rng.random(experts) < 2 / experts, np.inf, row),
        lambda row: rng.choice([-0.0, 0.0], experts),
        lambda row: np.where(np.arange(experts) % 2, row, -200),
        lambda row: np.where(np.arange(experts) < experts // 2, row, np.finfo(np.float32).min),
    )
    for token in range(1, tokens, 2):
        x[token] = kinds[token // 2 % len(kinds)](x[token])
    return x


def scores(x: np.ndarray, score: str | None) -> np.ndarray:
    """In the dtype of x; one token."""
    with np.errstate(all="ignore"):
        if score == "softmax":
            powers = np.exp(x - x.max())
            return powers / powers.sum()
        if score == "sigmoid":
            return np.exp(-np.logaddexp(0, -x))
        return np.sqrt(np.logaddexp(0, x)) if score == "sqrt_softplus" else x


def choice(ranking: np.ndarray, router: Router) -> list[int]:
    """The ids of one token, as a loop; sorting is stable, so ties go to the lower id."""
    ranking = np.maximum(np.where(np.isnan(ranking), LOWEST, ranking), LOWEST)
    groups = ranking.reshape(router.num_groups, -1)
    power = (0.5 * np.sort(groups, axis=1)[:, -2:]).sum(1)
    best = set(np.argsort(-power, kind="stable")[: router.top_groups].tolist())
    allowed = [e for e in range(ranking.size) if e // groups.shape[1] in best]
    return sorted(allowed, key=lambda e: (-ranking[e], e))[: router.top_k]


def gradient(x: np.ndarray, ids: Any, by: np.ndarray, router: Router) -> tuple[np.ndarray, float]:
    """The gradient of one token's logits in float64, for that of its weights; and how large its terms are,
    which may cancel."""
    sigmoid, score = scores(x, "sigmoid"), scores(x, router.score)
    slope = {
        "softmax": lambda: score,
        "sigmoid": lambda: sigmoid * scores(-x, "sigmoid"),
        "sqrt_softplus": lambda: sigmoid / (2 * score),
        None: lambda: np.ones_like(x),
    }[router.score]()
    pull = router.scale * by
    if router.renormalize:
        total = score[ids].sum() + 1e-20
        pull = (pull - (pull * score[ids]).sum() / total) / total
    row = np.zeros_like(x)
    row[ids] = pull
    size = np.abs(router.scale * by).max() * slope[ids].max() / (abs(total) if router.renormalize else 1)
    return slope * (row - (score @ row if router.score == "softmax" else 0)), size
