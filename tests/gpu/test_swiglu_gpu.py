"""Activations that are not quantised, and their gradients, on a GPU: against float64, and within a rounding
of the same formula in jax.numpy.

Run: pytest -m gpu tests/gpu/test_swiglu_gpu.py        (seconds)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.activation import GPT_OSS, Activation, swiglu
from jax_deepgemm.moe import ExpertForm, moe_mlp
from jax_deepgemm.ops.swiglu.problem import SwigluProblem
from tests.gpu.test_fused_gpu import draw, on_both
from tests.shared.activations import ACTIVATIONS, activate, repeated

DTYPES = ("bfloat16", "float16", "float32")
SHAPES = ((300, 2048), (33, 776), (5, 131), (1, 1))


def kernels() -> Iterator[Any]:
    for (rows, width), x, activation in itertools.product(SHAPES, DTYPES, ACTIVATIONS.values()):
        for kind in ("act", "grad"):
            yield SwigluProblem(kind, rows, width, x, True, activation)
    for kind in ("act", "grad"):
        yield SwigluProblem(kind, 600, 768)
        yield SwigluProblem(kind, 600, 768, weighted=True)


def close(got: Any, exact: np.ndarray, dtype: Any) -> None:
    """Within one unit in the last place of the type, or of what float32 makes of the terms."""
    got, near = np.asarray(got).astype(np.float64), float(jnp.finfo(dtype).eps)
    top = np.abs(exact).max(axis=-1, keepdims=True, initial=1e-30)
    wrong = ~(np.abs(got - exact) <= np.abs(exact) * max(near, 4e-6) + 2e-6 * top + 1e-7)
    assert not wrong.any(), (np.argwhere(wrong)[:5], got[wrong][:5], exact[wrong][:5])


@pytest.mark.smoke
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, activation):
    rows, width = shape
    for dtype in DTYPES:
        h = draw((rows, width * activation.halves), dtype, spread=0.5)
        dact, weight = draw(shape, dtype, 1, spread=0.5), draw((rows,), "float32", 2, spread=0)
        function = functools.partial(swiglu, activation=activation)
        got, (dh, dweight) = jax.jit(
            lambda h, w, d, f=function: (lambda y, vjp: (y, vjp(d)))(*jax.vjp(f, h, w))
        )(h, weight, dact)
        act, partials = activate(h, activation)
        wide = dact.astype(np.float64)
        close(got, act * weight[:, None].astype(np.float64), dtype)
        close(dh, partials * repeated(wide, activation) * weight[:, None], dtype)
        terms = np.abs(act * wide).sum(axis=1)
        assert (np.abs(np.asarray(dweight) - (act * wide).sum(axis=1)) <= 1e-5 * terms + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_next_to_the_plain_form(dtype):
    """Rounded results are equal, or neighbours where the hardware's exp is on the other side of a middle."""
    h, weight = draw((300, 4096), dtype, spread=0.5), draw((300,), "float32", 2, spread=0)
    (got,), (want,) = on_both(swiglu, h, weight)
    if dtype == "float32":
        np.testing.assert_allclose(got, want, rtol=4e-6, atol=1e-7)
        return
    apart = np.abs(ordered(got) - ordered(want))
    assert apart.max() <= 1
    assert (apart == 0).mean() > 0.995


def ordered(x: np.ndarray) -> np.ndarray:
    """Numbers of 16 bits by their place on the line; both zeros are one."""
    bits = x.view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


def test_batches_that_share_an_operand_and_nan():
    h, weight = draw((2, 300, 1536), spread=0.5), draw((300,), "float32", 1, spread=0)
    h[1, 7, 5], h[0, 3, 900] = np.nan, np.inf
    step = jax.jit(jax.vmap(swiglu, (0, None)))
    got = np.asarray(step(h, weight), np.float32)
    for i in range(2):
        alone = np.asarray(jax.jit(swiglu)(h[i], weight), np.float32)
        np.testing.assert_array_equal(got[i], alone)
    assert np.isnan(got[1, 7, 5])
    assert np.isnan(got[1]).sum() == 1
    several = jax.jit(jax.vmap(swiglu, (None, 0)))(h[0], jnp.stack([weight, 2 * weight]))
    np.testing.assert_array_equal(np.asarray(several[0], np.float32), got[0])


def test_equal_bits_every_time():
    h, dact, weight = draw((600, 1536)), draw((600, 768), seed=1), draw((600,), "float32", 2)

    @jax.jit
    def step(h: Any, weight: Any, dact: Any) -> Any:
        act, vjp = jax.vjp(swiglu, h, weight)
        dh, dweight = vjp(dact)
        return act.view(jnp.uint16), dh.view(jnp.uint16), dweight

    first = [np.asarray(part) for part in step(h, weight, dact)]
    for _ in range(20):
        jax.block_until_ready([jnp.full((1 << 22,), jnp.nan) for _ in range(4)])
        for got, want in zip(step(h, weight, dact), first, strict=True):
            np.testing.assert_array_equal(np.asarray(got), want)


@pytest.mark.parametrize("activation", [Activation(), GPT_OSS, Activation("relu2")], ids=lambda a: a.tag)
def test_a_layer_in_bf16(activation):
    """Forward and gradients as on the CPU, where everything is jnp; some copies are dropped."""
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, 4, (200, 2)).astype(np.int32)
    weights = rng.random((200, 2)).astype(np.float32)
    x, dy = draw((200, 256), spread=0), draw((200, 256), seed=1, spread=0)
    w13 = (draw((4, activation.halves * 128, 256), seed=2, spread=0).astype(np.float32) / 16).astype(x.dtype)
    w2 = (draw((4, 256, 128), seed=3, spread=0).astype(np.float32) / 11).astype(x.dtype)
    form = ExpertForm(activation)

    def step(x: Any, weights: Any, w13: Any, w2: Any, dy: Any) -> Any:
        layer = lambda *args: moe_mlp(args[0], ids, *args[1:], recipe="bf16", form=form)  # noqa: E731
        y, vjp = jax.vjp(layer, x, weights, w13, w2)
        return [y, *vjp(dy)]

    for got, want in zip(*on_both(step, x, weights, w13, w2, dy), strict=True):
        mine, theirs = got.astype(np.float64), want.astype(np.float64)
        assert np.linalg.norm(mine - theirs) <= 0.01 * np.linalg.norm(theirs)
