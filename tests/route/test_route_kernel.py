"""The routing kernels' own source on a CPU, with the sanitizers on: against the reference and float64."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_deepgemm.ops.route import reference
from jax_deepgemm.ops.route.family import RouteProblem
from jax_deepgemm.ops.route.router import Router
from tests.shared import native_route, route_cases

pytestmark = pytest.mark.any_version

TOKENS = 23
FORMS = [
    (1, Router(1, renormalize=False)),
    (6, Router(2, "sigmoid")),
    (8, Router(8, "sqrt_softplus")),
    (20, Router(3, None, num_groups=5, top_groups=2)),
    (60, Router(4)),
    (100, Router(5, None, num_groups=4, top_groups=3)),
    (128, Router(8)),
    (160, Router(6, "softmax", num_groups=8, top_groups=3)),
    (256, Router(8, "sigmoid", num_groups=8, top_groups=4, scale=2.5)),
    (256, Router(6, "sqrt_softplus", scale=1.5)),
    (256, Router(32, None)),
    (512, Router(22, None, num_groups=32, top_groups=31)),
]


def problems(kind: str) -> list[RouteProblem]:
    """Both dtypes, with and without a bias, over the forms."""
    return [
        RouteProblem(
            kind,
            TOKENS,
            experts,
            router,
            x="bfloat16" if i % 3 == 2 else "float32",
            biased=kind == "route" and i % 2 == 0,
        )
        for i, (experts, router) in enumerate(FORMS)
    ]


def logits_of(seed: int, p: RouteProblem) -> np.ndarray:
    x = route_cases.hard_rows(seed, p.tokens, p.experts)
    return x.astype(ml_dtypes.bfloat16 if p.x == "bfloat16" else np.float32)


def bias_of(p: RouteProblem) -> np.ndarray:
    return np.round(np.random.default_rng(1).normal(size=p.experts) * 4).astype(np.float32) / 8


def ranks(p: RouteProblem, row: np.ndarray) -> np.ndarray:
    """What the experts of a token are chosen by, without groups."""
    router = Router(p.experts, p.router.score, renormalize=False)
    ids, scores = reference.choose(jnp.asarray(row[None]), None, router)
    found = np.zeros(p.experts, np.float32)
    found[np.asarray(ids[0])] = scores[0]
    return found + (bias_of(p) if p.biased else np.float32(0))


def test_the_choice(tmp_path: Path) -> None:
    calls = []
    for i, p in enumerate(problems("route")):
        operands = [logits_of(i, p), *([bias_of(p)] if p.biased else [])]
        shape = (p.tokens, p.router.top_k)
        calls.append((p, operands, [np.full(shape, -1, np.int32), np.full(shape, -1, np.float32)]))
    for (p, (x, *bias), _), (ids, weights) in zip(calls, native_route.run(tmp_path, calls), strict=True):
        run = jax.jit(reference.choose, static_argnums=2)
        want_ids, want = map(np.asarray, run(jnp.asarray(x), bias[0] if bias else None, p.router))
        for token in np.flatnonzero((ids != want_ids).any(1)):
            assert len(set(ids[token])) == p.router.top_k
            by = ranks(p, x[token])
            np.testing.assert_allclose(by[ids[token]], by[want_ids[token]], 1e-6, 0, err_msg=f"{p} {token}")
        np.testing.assert_allclose(weights, want, rtol=2e-6, atol=1e-38, err_msg=str(p))


def test_the_gradient(tmp_path: Path) -> None:
    calls = []
    for i, p in enumerate(problems("route_gradient")):
        drawn = logits_of(i, p)
        logits = np.clip(np.nan_to_num(drawn.astype(np.float32)), -90, 30).astype(drawn.dtype)
        ids, _ = reference.choose(jnp.asarray(logits), None, p.router)
        by = np.random.default_rng(i).normal(size=ids.shape).astype(np.float32)
        calls.append((p, [logits, np.asarray(ids), by], [np.full_like(logits, np.nan)]))
    for (p, (logits, ids, by), _), (got,) in zip(calls, native_route.run(tmp_path, calls), strict=True):
        rows = zip(logits.astype(np.float64), ids, by.astype(np.float64), strict=True)
        rounding = 2.0**-8 if p.x == "bfloat16" else 0.0
        for token, row in enumerate(rows):
            want, size = route_cases.gradient(*row, p.router)
            near = rounding * np.abs(want) + 2e-6 * size + 1e-16
            assert np.all(np.abs(got[token].astype(np.float64) - want) <= near), (p, token)
