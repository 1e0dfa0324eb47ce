"""Calls of grouped GEMMs for compute-sanitizer: groups that start anywhere, an empty one, sizes that are
wrong, NaN outside all groups."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import FEW_SMS, Case, on_few
from jax_deepgemm.ops.gemm.checks import WEIGHT_GRADIENTS
from jax_deepgemm.ops.gemm.epilogue import Epilogue
from jax_deepgemm.ops.gemm.family import GemmConfig
from jax_deepgemm.ops.gemm.sanitize import PING_PONG
from jax_deepgemm.ops.grouped import recipe
from jax_deepgemm.ops.grouped.api import (
    k_grouped_bf16_gemm_tn_contiguous,
    k_grouped_fp8_gemm_nt_contiguous,
    m_grouped_bf16_gemm_nn_contiguous,
    m_grouped_bf16_gemm_nt_contiguous,
    m_grouped_bf16_gemm_nt_masked,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
)
from jax_deepgemm.ops.grouped.gated import m_grouped_fp8_gemm_swiglu, m_masked_fp8_gemm_swiglu
from jax_deepgemm.ops.grouped.gathered import (
    k_grouped_bf16_gemm_tn_gathered,
    m_grouped_bf16_gemm_nn_gathered,
    m_grouped_bf16_gemm_nt_gathered,
    m_grouped_fp8_gemm_nt_gathered,
)
from jax_deepgemm.ops.quantize.activation import Activation
from jax_deepgemm.ops.quantize.api import quantize

HALVES = GemmConfig(128, 256, 4, slabs=2)
SIDE_BY_SIDE = GemmConfig(64, 128, 4, slabs=2)
TWO_PARTS = GemmConfig(256, 128, 4, slabs=2)
TWO_PARTS_OF_C = GemmConfig(256, 96, 4, slabs=2)
ROWS, N, K, GROUPS = 300, 136, 320, 4
SIZES = np.asarray([150, 0, 33, 70], np.int32)
USED = int(SIZES.sum())
BAD = {"negative": np.asarray([-7, 200, -1, 53], np.int32), "too many": 3 * SIZES}

Normal = Callable[..., jax.Array]


def cases() -> Iterator[Case]:
    """Yields every kind of grouped kernel."""
    rng = np.random.default_rng(1)

    def normal(*shape: int, good: int | None = None) -> jax.Array:
        drawn = rng.standard_normal(shape)
        drawn[good:] = drawn[good:] if good is None else np.nan
        return jnp.asarray(drawn, jnp.bfloat16)

    yield from _contiguous(normal)
    yield from _masked(normal)
    yield from _gated(normal)
    yield from _finished(normal)
    yield from _k_grouped(normal)
    yield from _gathered(normal)


def _contiguous(normal: Normal) -> Iterator[Case]:
    sizes, a, w, whole = jnp.asarray(SIZES), normal(ROWS, K, good=USED), normal(GROUPS, N, K), normal(ROWS, K)
    qa, qw, qw_rows, qwhole = quantize(a), quantize(w, (128, 128)), quantize(w, (1, 128)), quantize(whole)
    fp8, bf16 = m_grouped_fp8_gemm_nt_contiguous, m_grouped_bf16_gemm_nt_contiguous
    yield Case("grouped fp8", on_few(fp8), (qa, qw, sizes))
    yield Case("grouped fp8 B 1x128, few rows", on_few(fp8, expected_m=4), (qa, qw_rows, sizes // 16))
    yield Case("grouped fp8 to float32", on_few(fp8, out_dtype=jnp.float32), (qa, qw, sizes))
    for sms in (3, 8):  # four tiles
        yield Case(f"grouped fp8 halves, {sms} SMs", on_few(fp8, sms, config=HALVES), (qa, qw, sizes))
    yield Case("grouped fp8 two parts", on_few(fp8, config=TWO_PARTS), (qa, qw, sizes))
    for block in ((32, 32), (1, 32)):
        fine = quantize(a, (1, 32)), quantize(w, block), sizes
        yield Case(f"grouped fp8 B {block}", on_few(fp8), fine)
    yield Case("grouped bf16 nt", on_few(bf16), (a, w, sizes))
    yield Case("grouped bf16 nt, few rows", on_few(bf16, expected_m=4), (a, w, sizes // 16))
    yield Case("grouped bf16 ping-pong", on_few(bf16, config=PING_PONG), (a, w, sizes))
    yield Case("grouped fp8 side by side", on_few(fp8, config=SIDE_BY_SIDE), (qa, qw, sizes))
    yield Case("grouped bf16 nn", on_few(m_grouped_bf16_gemm_nn_contiguous), (a, w.mT, sizes))
    for name, wrong in BAD.items():
        yield Case(f"grouped fp8, {name}", on_few(fp8), (qwhole, qw, jnp.asarray(wrong)))
        yield Case(f"grouped bf16, {name}", on_few(bf16), (whole, w, jnp.asarray(wrong)))
    index = jnp.asarray(np.repeat([2, -1, 0, 3, -1], [100, 28, 50, 77, 45]), jnp.int32)
    yield Case("grouped fp8, index", lambda a, w, i: fp8(a, w, m_indices=i), (qwhole, qw, index))
    ends = jnp.asarray([90, 128, 200, 300], jnp.int32)
    yield Case("grouped bf16, ends", lambda a, w, e: bf16(a, w, ends=e, alignment=64), (whole, w, ends))


def _masked(normal: Normal) -> Iterator[Case]:
    capacity, mask = 100, jnp.asarray([100, 0, 3, 70], jnp.int32)
    deep, w = normal(GROUPS, capacity, K), normal(GROUPS, N, K)
    fp8, bf16 = m_grouped_fp8_gemm_nt_masked, m_grouped_bf16_gemm_nt_masked

    def valid(d: jax.Array, mask: jax.Array) -> jax.Array:
        """What is outside the groups is not written."""
        return jnp.where(jnp.arange(capacity)[:, None] < mask[:, None, None], d, 0)

    for kind, function, a, b in (
        ("fp8", fp8, quantize(deep), quantize(w, (128, 128))),
        ("fp8 32x32", fp8, quantize(deep, (1, 32)), quantize(w, (32, 32))),
        ("bf16", bf16, deep, w),
    ):
        run, zeroing = on_few(function, zero_rows=False), on_few(function, zero_rows=True)
        yield Case(f"masked {kind}", lambda a, b, m, run=run: valid(run(a, b, m), m), (a, b, mask))
        yield Case(f"masked {kind} zero_rows", zeroing, (a, b, mask))
    gradient = jax.grad(lambda w, a, m: valid(bf16(a, w, m), m).sum())
    yield Case("masked bf16, gradient of B", gradient, (w, deep, mask))


def _gated(normal: Normal) -> Iterator[Case]:
    """Scales are compared: a value may be another number of FP8 where h is rounded otherwise."""
    capacity, mask = 100, jnp.asarray([100, 0, 3, 70], jnp.int32)
    w, a, sizes = (
        quantize(normal(GROUPS, 2 * 256, K), (128, 128)),
        normal(ROWS, K, good=USED),
        jnp.asarray(SIZES),
    )
    weights, deep = jnp.ones(ROWS).at[USED:].set(jnp.nan), quantize(normal(GROUPS, capacity, K))
    for height in (64, 128):
        fused = on_few(m_grouped_fp8_gemm_swiglu, config=GemmConfig(height, 256, 4, slabs=2, gated=True))

        def rows(a: jax.Array, w: jax.Array, s: jax.Array, x: jax.Array, fused: Any = fused) -> jax.Array:
            found: jax.Array = fused(a, w, s, x).scales
            return found

        yield Case(f"grouped swiglu {height}", rows, (quantize(a), w, sizes, weights))

        def biased(
            a: jax.Array, w: jax.Array, s: jax.Array, x: jax.Array, b: jax.Array, fused: Any = fused
        ) -> jax.Array:
            found: jax.Array = fused(a, w, s, x, bias=b).scales
            return found

        bias = normal(GROUPS, 2 * 256)
        yield Case(f"grouped swiglu bias {height}", biased, (quantize(a), w, sizes, weights, bias))
    for name, wrong in BAD.items():
        operands = (quantize(normal(ROWS, K)), w, jnp.asarray(wrong), jnp.ones(ROWS))
        yield Case(f"grouped swiglu, {name}", rows, operands)

    def masked(a: jax.Array, w: jax.Array, m: jax.Array, x: jax.Array) -> jax.Array:
        found = on_few(m_masked_fp8_gemm_swiglu)(a, w, m, x).scales
        return jnp.where(jnp.arange(capacity)[:, None] < m[:, None, None], found, 0)

    yield Case("masked swiglu", masked, (deep, w, mask, jnp.ones((GROUPS, capacity))))


def _finished(normal: Normal) -> Iterator[Case]:
    """Epilogues; of quantised results the scales are compared, as in `_gated`."""
    sizes, a, w, whole = jnp.asarray(SIZES), normal(ROWS, K, good=USED), normal(GROUPS, N, K), normal(ROWS, K)
    fp8, bf16, bias = m_grouped_fp8_gemm_nt_contiguous, m_grouped_bf16_gemm_nt_contiguous, normal(GROUPS, N)
    qa, qw, pairs = quantize(a), quantize(w, (128, 128)), Activation(interleaved=True)
    for said, activation in (("gelu", "gelu"), ("pairs", pairs)):
        epilogue = functools.partial(Epilogue, 0.1, activation=activation)

        def run(function: Any, a: Any, w: Any, s: Any, b: Any, epilogue: Any = epilogue, **more: Any) -> Any:
            return on_few(function, epilogue=epilogue(bias=b), **more)(a, w, s)

        for kind, function, pair in (("fp8", fp8, (qa, qw)), ("bf16", bf16, (a, w))):
            case = functools.partial(run, function)
            yield Case(f"grouped {kind} {said}", case, (*pair, sizes, bias))
        config = GemmConfig(128, 256, 4, slabs=0 if activation == pairs else 2)
        halves = functools.partial(run, fp8, config=config)
        yield Case(f"grouped fp8 halves {said}", halves, (qa, qw, sizes, bias))
        for name, wrong in BAD.items():
            operands = (quantize(whole), qw, jnp.asarray(wrong), bias)
            yield Case(f"grouped fp8 {said}, {name}", functools.partial(run, fp8), operands)
    wide, capacity, mask = normal(GROUPS, 144, K), 100, jnp.asarray([100, 0, 3, 70], jnp.int32)
    deep = normal(GROUPS, capacity, K)

    def scales(a: Any, w: Any, s: Any) -> Any:
        return on_few(fp8, epilogue=Epilogue(0.1, None, "silu", (1, 128)))(a, w, s).scales

    def masked(a: Any, w: Any, m: Any) -> Any:
        epilogue = Epilogue(0.1, None, "silu", (1, 128))
        found = on_few(m_grouped_bf16_gemm_nt_masked, epilogue=epilogue)(a, w, m).scales
        return jnp.where(jnp.arange(capacity)[:, None] < m[:, None, None], found, 0)

    yield Case("grouped fp8 quantised", scales, (qa, quantize(wide, (128, 128)), sizes))
    yield Case("masked bf16 quantised", masked, (deep, wide, mask))


def _weight_gradient(scales: str, dy: jax.Array, x: jax.Array, sizes: jax.Array) -> jax.Array:
    """As layers compute it, with blocks that begin with each group."""
    options = recipe.LayerOptions(num_sms=FEW_SMS, weight_gradient=scales)
    groups = recipe.Groups.of(sizes, None)
    dy_t, x_t = recipe.both(dy, groups, options, "dy")[1], recipe.both(x, groups, options, "x")[1]
    return recipe.k_grouped(dy_t, x_t, groups, dy.shape[0], GROUPS, options, jnp.float32)


def _k_grouped(normal: Normal) -> Iterator[Case]:
    sizes, a, dy = jnp.asarray(SIZES), normal(ROWS, K, good=USED), normal(ROWS, N, good=USED)
    c = jnp.ones((GROUPS, K, N), jnp.float32)
    fp8, bf16 = k_grouped_fp8_gemm_nt_contiguous, k_grouped_bf16_gemm_tn_contiguous
    for kind, function, given in (("fp8", fp8, (quantize(a.T), quantize(dy.T))), ("bf16", bf16, (a, dy))):
        float32 = functools.partial(on_few, function, out_dtype=jnp.float32)
        yield Case(f"k-grouped {kind} side by side + C", float32(config=SIDE_BY_SIDE), (*given, sizes, c))
        if kind == "fp8":
            yield Case("k-grouped fp8 two parts + C", float32(config=TWO_PARTS_OF_C), (*given, sizes, c))
        yield Case(f"k-grouped {kind}", on_few(function, out_dtype=jnp.bfloat16), (*given, sizes))
        yield Case(f"k-grouped {kind} + C", float32(), (*given, sizes, c))
    turns = on_few(bf16, out_dtype=jnp.float32, config=PING_PONG)
    yield Case("k-grouped bf16 ping-pong + C", turns, (a, dy, sizes, c))
    whole, whole_dy = normal(ROWS, K), normal(ROWS, N)
    for scales in WEIGHT_GRADIENTS:
        gradient, what = (
            functools.partial(_weight_gradient, scales),
            f"k-grouped fp8 of whole blocks {scales}",
        )
        yield Case(what, gradient, (dy, a, sizes))
        for name, wrong in BAD.items():
            yield Case(f"{what}, {name}", gradient, (whole_dy, whole, jnp.asarray(wrong)))
    for name, wrong in BAD.items():
        yield Case(f"k-grouped bf16, {name}", on_few(bf16), (whole, whole_dy, jnp.asarray(wrong)))


def _gathered(normal: Normal) -> Iterator[Case]:
    """Rows that are none, some of them far away; what lies outside all groups is not looked up."""
    sizes, sources, w, c = jnp.asarray(SIZES), normal(70, K), normal(GROUPS, N, K), jnp.ones((GROUPS, K, N))
    rng = np.random.default_rng(2)
    rows = rng.integers(-3, 75, ROWS).astype(np.int32)
    rows[:3] = np.iinfo(np.int32).max, np.iinfo(np.int32).min, 70
    index, dy = jnp.asarray(rows), normal(ROWS, N)
    fp8, bf16 = m_grouped_fp8_gemm_nt_gathered, m_grouped_bf16_gemm_nt_gathered
    quantised = quantize(sources), quantize(w, (128, 128)), index
    yield Case("gathered fp8", on_few(fp8), (*quantised, sizes))
    for name, config in (("halves", HALVES), ("side by side", SIDE_BY_SIDE)):
        yield Case(f"gathered fp8 {name}", on_few(fp8, config=config), (*quantised, sizes))
    yield Case("gathered bf16 nt", on_few(bf16), (sources, w, index, sizes))
    yield Case("gathered bf16 ping-pong", on_few(bf16, config=PING_PONG), (sources, w, index, sizes))
    yield Case("gathered bf16 nn", on_few(m_grouped_bf16_gemm_nn_gathered), (sources, w.mT, index, sizes))
    for name, wrong in BAD.items():
        yield Case(f"gathered fp8, {name}", on_few(fp8), (*quantised, jnp.asarray(wrong)))
        yield Case(f"gathered bf16, {name}", on_few(bf16), (sources, w, index, jnp.asarray(wrong)))
    for side in "ab":

        def inner(x: Any, dy: Any, index: Any, sizes: Any, c: Any, side: str = side) -> Any:
            pair, name = ((x, dy) if side == "a" else (dy, x)), {f"{side}_rows": index}
            return on_few(k_grouped_bf16_gemm_tn_gathered)(*pair, sizes, c, **name)

        operands = sources, dy, index, sizes, c if side == "a" else c.mT
        yield Case(f"k-gathered bf16 {side} + C", inner, operands)
