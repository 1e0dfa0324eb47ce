"""Routing kernels on an H200: against the reference, which runs on the CPU, and float64.

Run: pytest -m gpu tests/gpu/test_route_gpu.py        (about a minute, kernels compiled anew)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.moe import DEEPSEEK_V3, route
from jax_deepgemm.ops.route import reference
from jax_deepgemm.ops.route.family import RouteProblem
from jax_deepgemm.ops.route.op import gradient_of
from jax_deepgemm.ops.route.router import SCORES, Router
from tests.shared import route_cases

V3 = Router(8, **{**DEEPSEEK_V3, "renormalize": True})
V4 = Router(6, "sqrt_softplus", scale=1.5)
SIZES = ((1, 1), (3, 2), (8, 2), (17, 5), (32, 32), (33, 4), (60, 4), (64, 6), (128, 8), (160, 6), (257, 9),
         (384, 8), (512, 22), (1000, 16), (1024, 1), (2047, 31), (2048, 32))  # fmt: skip
GROUPED = (
    (16, 3, 4, 2),
    (20, 4, 20, 7),
    (60, 6, 3, 2),
    (160, 6, 8, 3),
    (256, 8, 32, 5),
    (2048, 32, 32, 9),
    (6, 2, 2, 1),
)
"""Experts, top_k, groups, groups that count."""


def forms() -> Iterator[tuple[int, Router]]:
    """Every size with one score, every score with some sizes, and groups."""
    for i, (experts, top_k) in enumerate(SIZES):
        for score in SCORES if experts in (8, 60, 128, 2048) else SCORES[i % 4 : i % 4 + 1]:
            yield experts, Router(top_k, score, renormalize=top_k > 1 and i % 3 > 0, scale=1 + i % 2)
    for i, (experts, top_k, groups, top_groups) in enumerate(GROUPED):
        yield experts, Router(top_k, SCORES[i % 4], groups, top_groups, i % 2 == 0)
    yield from ((256, V3), (256, V4), (384, V4))


def problems() -> Iterator[RouteProblem]:
    """Both dtypes, with and without a bias."""
    for i, (experts, router) in enumerate(forms()):
        dtype = "bfloat16" if i % 3 == 2 else "float32"
        yield RouteProblem("route", 150 + i, experts, router, dtype, biased=i % 2 == 1 or router in (V3, V4))


def kernels() -> Iterator[RouteProblem]:
    """What the tables below need (kernels.py)."""
    for p in problems():
        yield p
        yield RouteProblem("route_gradient", p.tokens, p.experts, p.router, p.x)


def logits_of(p: RouteProblem, seed: int = 0) -> jax.Array:
    return jnp.asarray(route_cases.hard_rows(seed, p.tokens, p.experts), p.x)


def bias_of(p: RouteProblem) -> jax.Array | None:
    numbers = np.round(np.random.default_rng(1).normal(size=p.experts) * 4).astype(np.float32) / 8
    return jnp.asarray(numbers) if p.biased else None


def run(p: RouteProblem, logits: Any, bias: Any, where: str = "gpu") -> tuple[np.ndarray, np.ndarray]:
    """ids and weights, of the public function; on the CPU it is the reference."""
    r = p.router
    groups = {"num_groups": r.num_groups, "top_groups": r.top_groups} if r.num_groups > 1 else {}
    options = {"score": r.score, "renormalize": r.renormalize, "scale": r.scale, **groups}
    device = jax.devices("cpu" if where == "cpu" else None)[0]
    step = jax.jit(lambda x, b: route(x, r.top_k, bias=b, **options))
    return tuple(map(np.asarray, step(*jax.device_put((logits, bias), device))))  # type: ignore[return-value]


def ranks_of(p: RouteProblem, logits: Any) -> np.ndarray:
    """What every expert is chosen by, on the CPU, without groups."""
    router = Router(p.experts, p.router.score, renormalize=False)
    with jax.default_device(jax.devices("cpu")[0]):
        choose = functools.partial(reference.choose, bias=None, router=router)
        ids, scores = map(np.asarray, jax.jit(choose)(jax.device_put(logits, jax.devices("cpu")[0])))
    found = np.empty(logits.shape, np.float32)
    np.put_along_axis(found, ids, scores, axis=1)
    return found + (np.asarray(bias_of(p)) if p.biased else np.float32(0))


def assert_same(p: RouteProblem, logits: Any, got: Any, want: Any) -> None:
    """Equal ids but where scores differ by rounding alone, which then are distinct; weights to 2e-6, as both
    sides round."""
    (ids, weights), (want_ids, want_weights) = got, want
    assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
    wrong = np.flatnonzero((ids != want_ids).any(1))
    assert len(wrong) <= 0.1 * len(ids), (p, wrong)
    if len(wrong):
        ranks = ranks_of(p, logits)
        for token in wrong:
            assert len(set(ids[token].tolist())) == p.router.top_k
            assert ids[token].min() >= 0
            assert ids[token].max() < p.experts
            by = ranks[token]
            np.testing.assert_allclose(
                by[ids[token]], by[want_ids[token]], 1e-6, 1e-7, err_msg=f"{p} {token}"
            )
    np.testing.assert_allclose(weights, want_weights, rtol=4e-6, atol=2e-38, err_msg=str(p))


@pytest.mark.smoke
@pytest.mark.gpu
@pytest.mark.parametrize("p", problems(), ids=str)
def test_the_choice_is_that_of_the_reference(p):
    logits, bias = logits_of(p), bias_of(p)
    assert_same(p, logits, run(p, logits, bias), run(p, logits, bias, "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("p", [p for p in problems() if p.x == "float32"], ids=str)
def test_scores_against_float64(p):
    """Weights to 1e-6 of their size, of spread logits; ids by the scores where those are apart."""
    x = np.random.default_rng(3).normal(size=(p.tokens, p.experts)).astype(np.float32) * 3
    x = np.abs(x) if p.router.score is None else x
    ids, weights = run(p, jnp.asarray(x), bias_of(p))
    for token in range(0, p.tokens, 7):
        scores = route_cases.scores(x[token].astype(np.float64), p.router.score)
        chosen = scores[ids[token]]
        want = p.router.scale * (chosen / (chosen.sum() + 1e-20) if p.router.renormalize else chosen)
        near = 3e-6 if p.router.score == "softmax" else 1e-6  # logit - largest logit is rounded
        np.testing.assert_allclose(weights[token], want, rtol=near, atol=1e-38)
        ranking = scores + (np.asarray(bias_of(p), np.float64) if p.biased else 0)
        best = route_cases.choice(ranking, p.router)
        np.testing.assert_allclose(ranking[ids[token]], ranking[best], rtol=1e-6, atol=3e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("p", problems(), ids=str)
def test_the_gradient_against_float64(p):
    """Of every logit, also of those whose experts were not chosen."""
    r, x = p.router, np.asarray(logits_of(p, 5)).astype(np.float32)
    x = jnp.asarray(np.clip(np.nan_to_num(x), -80, 30), p.x)
    ids, _ = run(p, x, bias_of(p))
    by = np.random.default_rng(6).normal(size=ids.shape).astype(np.float32)
    pull = jax.jit(lambda x, ids, by: gradient_of(True, x, ids, by, r))
    got = np.asarray(pull(x, ids, by)).astype(np.float64)
    wide = np.asarray(x).astype(np.float64)
    rounding = 2.0**-8 if p.x == "bfloat16" else 0.0
    for token in range(p.tokens):
        want, size = route_cases.gradient(wide[token], ids[token], by[token].astype(np.float64), r)
        near = rounding * np.abs(want) + 2e-6 * size + 1e-16
        assert np.all(np.abs(got[token] - want) <= near), (p, token)


@pytest.mark.smoke
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("experts", "router"), [(256, V3), (256, V4), (128, Router(8)), (8, Router(2))], ids=str
)
def test_both_passes_give_equal_bits_every_time(experts, router):
    """4097 tokens, of which the last one has a block of its own; twenty times."""
    p = RouteProblem("route", 4097, experts, router, biased=router is V3)
    logits, bias = logits_of(p), bias_of(p)
    first = run(p, logits, bias)
    by = jnp.ones(first[1].shape)
    pull = jax.jit(lambda x, ids: gradient_of(True, x, ids, by, router))
    gradient = np.asarray(pull(jnp.nan_to_num(logits), first[0]))
    for _ in range(20):
        again = run(p, logits, bias)
        assert [one.tobytes() for one in again] == [one.tobytes() for one in first]
        assert np.asarray(pull(jnp.nan_to_num(logits), first[0])).tobytes() == gradient.tobytes()
    assert_same(p, logits, first, run(p, logits, bias, "cpu"))


@pytest.mark.gpu
def test_one_token_and_none():
    for tokens in (0, 1):
        p = RouteProblem("route", tokens, 256, V3)
        logits = logits_of(p)
        assert_same(p, logits, run(p, logits, None), run(p, logits, None, "cpu"))


@pytest.mark.gpu
def test_derivatives_through_the_public_function():
    """First order by the kernel, second by jnp, under vmap and jit; as on the CPU."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 40, 64)), jnp.float32)

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(route(x, 6, **{**DEEPSEEK_V3, "num_groups": 4, "top_groups": 2})[1]))

    def everything(x: jax.Array) -> Any:
        first = jax.vmap(jax.grad(loss))(x)
        second = jax.vmap(lambda x: jax.jvp(jax.grad(loss), (x,), (jnp.ones_like(x),))[1])(x)
        return first, second

    step = jax.jit(everything)
    got, want = step(x), step(jax.device_put(x, jax.devices("cpu")[0]))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
