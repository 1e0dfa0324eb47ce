"""m-grouped FP8 GEMMs fused with SwiGLU on an H200: bit for bit the kernels in a row, with NaN where nothing
counts.

Run: pytest -m gpu tests/gpu/test_grouped_swiglu_gpu.py        (about a minute, kernels compiled anew)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm.activation import swiglu_quantize
from jax_deepgemm.moe import moe_mlp, moe_mlp_decode
from jax_deepgemm.ops.gemm.family import GemmConfig
from jax_deepgemm.ops.grouped import gated
from jax_deepgemm.ops.grouped.gated import m_grouped_fp8_gemm_swiglu, m_masked_fp8_gemm_swiglu
from jax_deepgemm.ops.grouped.problem import GroupedProblem
from jax_deepgemm.quantization import QuantizedArray
from tests.shared import grouped_cases as cases
from tests.shared.gpu_programs import program
from tests.shared.moe_oracle import normal, random_ids

BF16, F32 = jnp.bfloat16, jnp.float32
TILES = {height: GemmConfig(height, 256, 4, slabs=2, gated=True) for height in (64, 128)}
# groups, rows, features, k: one group, odd rows, k that is no whole quad or block, more tiles than SMs,
# groups of few rows each, many groups.
SHAPES = (
    (1, 65, 128, 128),
    (4, 333, 256, 448),
    (8, 1031, 384, 640),
    (32, 2000, 256, 1024),
    (7, 129, 768, 200),
    (64, 70, 128, 512),
    (256, 300, 128, 384),
    (32, 257, 2048, 7168),
)


def kernels() -> Iterator[GroupedProblem]:
    """What the chosen configurations of the tables below need (kernels.py)."""
    for groups, rows, features, k in SHAPES:
        sizes: dict[str, Any] = {"groups": groups, "segments": groups, "n": 2 * features, "k": k}
        yield GroupedProblem("rows", m=rows, expected=max(1, rows // groups), gated=True, **sizes)


def bits(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.view({1: np.uint8, 4: np.uint32}[x.dtype.itemsize])


def assert_same(got: tuple[Any, ...], want: tuple[Any, ...], counted: Any = np.s_[:]) -> None:
    for what, one, other in zip(("values", "scales"), got, want, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        wrong = np.argwhere(bits(one)[counted] != bits(other)[counted])
        assert not len(wrong), f"{what} {one.shape}: {len(wrong)} differ, first at {wrong[:5].tolist()}"


def quantised(*shape: int, seed: int, block: tuple[int, int] = (1, 128)) -> QuantizedArray:
    return program(functools.partial(jdg.quantize, block=block))(normal(seed, *shape))


def poisoned(a: QuantizedArray, good: jax.Array) -> QuantizedArray:
    """NaN in the rows that are not good, values and scales."""
    values = jnp.where(good[..., None], a.values, jnp.full((), jnp.nan, a.values.dtype))
    return QuantizedArray(values, jnp.where(good[..., None], a.scales, jnp.nan), a.block)


def in_a_row(a: Any, b: Any, sizes: Any, weights: Any) -> tuple[jax.Array, jax.Array]:
    """What the fused kernel stands for."""
    rows = a.values.shape[0]
    h = jdg.m_grouped_fp8_gemm_nt_contiguous(a, b, sizes)
    end = jnp.minimum(jnp.cumsum(jnp.clip(sizes, 0, rows).astype(F32))[-1], rows).astype(jnp.int32)
    return swiglu_quantize(h, weights, end[None], transposed=False)


def fused(a: Any, b: Any, sizes: Any, weights: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    got = m_grouped_fp8_gemm_swiglu(a, b, sizes, weights, **options)
    return got.values, got.scales


def into_nan(function: Any) -> Any:
    """The function, whose results take the place of donated buffers of NaN: every element is written."""
    step = program(lambda _, *x: function(*x), donate_argnums=0, keep_unused=True)

    def run(*operands: Any) -> Any:
        shapes = jax.eval_shape(function, *operands)
        return step(tuple(jnp.full(one.shape, jnp.nan, one.dtype) for one in shapes), *operands)

    return run


PLAIN = program(in_a_row)


@functools.cache
def operands(groups: int, rows: int, features: int, k: int) -> tuple[Any, Any, jax.Array]:
    a, b = quantised(rows, k, seed=0), quantised(groups, 2 * features, k, seed=1, block=(128, 128))
    return a, b, normal(2, rows, dtype=F32)


@pytest.mark.parametrize("height", [None, 64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_kernels_in_a_row(shape, height):
    """Rows behind all groups hold NaN, and so do their weights; results are written over NaN."""
    groups, rows, *_ = shape
    a, b, weights = operands(*shape)
    step = into_nan(functools.partial(fused, config=TILES.get(height)))
    for name, sizes in cases.patterns(groups, rows).items():
        used = min(int(np.clip(sizes, 0, rows).astype(np.int64).sum()), rows)
        good = jnp.arange(rows) < used
        given = poisoned(a, good), b, jnp.asarray(sizes), jnp.where(good, weights, jnp.nan)
        got = step(*given)
        assert_same(got, PLAIN(a, b, jnp.asarray(sizes), jnp.where(good, weights, 0)))
        assert not bits(got[0])[used:].any(), name


@pytest.mark.smoke
@pytest.mark.parametrize("height", [None, 64, 128])
@pytest.mark.parametrize("shape", [(8, 1031, 384, 640), (64, 70, 128, 512)], ids=str)
def test_bits_with_a_bias(shape, height):
    """NaN as the biases of groups without rows."""
    groups, rows, features, _ = shape
    a, b, weights = operands(*shape)
    drawn = normal(3, groups, 2 * features, dtype=F32)

    def plain(a: Any, b: Any, sizes: Any, weights: Any, bias: Any) -> Any:
        h = jdg.m_grouped_fp8_gemm_nt_contiguous(a, b, sizes)
        ends = jnp.cumsum(jnp.clip(sizes, 0, rows).astype(jnp.int32))
        group = jnp.minimum(jnp.searchsorted(ends, jnp.arange(rows), side="right"), groups - 1)
        h = (h.astype(F32) + jnp.where(jnp.isnan(bias), 0, bias)[group]).astype(BF16)
        return swiglu_quantize(h, weights, jnp.minimum(ends[-1:], rows), transposed=False)

    step = program(lambda *given: fused(*given[:4], bias=given[4], config=TILES.get(height)))
    whole = program(plain)
    for skew in (0.05, 1.0, 100.0):
        rng = np.random.default_rng(0)
        sizes = rng.multinomial(rows - 7, rng.dirichlet([skew] * groups)).astype(np.int32)
        bias = jnp.where(jnp.asarray(sizes > 0)[:, None], drawn, jnp.nan)
        given = a, b, jnp.asarray(sizes), weights, bias
        assert_same(step(*given), whole(*given))


@pytest.mark.parametrize("sms", [1, 3, 131])
@pytest.mark.parametrize("height", [64, 128])
def test_twenty_runs_give_the_same_bits_with_few_sms(sms, height):
    """Each block of threads has many tiles, whose epilogues run beside the next one's first product."""
    a, b, weights = operands(8, 1031, 384, 640)
    sizes = jnp.asarray(cases.patterns(8, 1031)["tail"])
    want = PLAIN(a, b, sizes, weights)
    step = into_nan(functools.partial(fused, config=TILES[height], num_sms=sms))
    for _ in range(20):
        assert_same(step(a, b, sizes, weights), want)


@pytest.mark.parametrize("height", [64, 128])
def test_drawn_sizes(height):
    """As routing draws them: multinomial, skewed, mostly empty; one compiled program for all."""
    a, b, weights = operands(32, 1500, 256, 512)
    step = program(functools.partial(fused, config=TILES[height]))
    rng = np.random.default_rng(0)
    for skew in (0.05, 0.3, 1.0, 100.0) * 5:
        sizes = rng.multinomial(rng.integers(0, 1501), rng.dirichlet([skew] * 32)).astype(np.int32)
        given = a, b, jnp.asarray(sizes), weights
        assert_same(step(*given), PLAIN(*given))


@pytest.mark.parametrize("height", [64, 128])
def test_numbers_that_are_none(height):
    """Infinities and NaN, from weights and from h: as the kernels in a row treat them."""
    a, b, weights = operands(4, 333, 256, 448)
    weights = weights.at[jnp.array([3, 70, 200])].set(jnp.array([jnp.inf, -jnp.inf, jnp.nan]))
    scales = a.scales.at[jnp.array([10, 100])].set(1e38).at[11].set(jnp.nan).at[12].set(0)
    given = QuantizedArray(a.values, scales, a.block), b, jnp.array([100, 0, 150, 83], jnp.int32), weights
    got = program(functools.partial(fused, config=TILES[height]))(*given)
    assert_same(got, PLAIN(*given))
    assert 0 < np.isnan(np.asarray(got[0]).astype(np.float32)).sum() < got[0].size // 2


@pytest.mark.smoke
def test_group_offset():
    """B holds two of six groups; rows of the others are zeros, and may be NaN in A and in the weights."""
    a, b, weights = operands(6, 700, 256, 512)
    sizes = np.asarray(cases.patterns(6, 700)["tail"])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    every = PLAIN(a, b, jnp.asarray(sizes), weights)
    for offset in (0, 3, 4):
        mine = np.s_[starts[offset] : starts[offset + 2]]
        good = jnp.zeros(700, bool).at[mine].set(True)
        part = jax.tree.map(lambda z, at=offset: z[at : at + 2], b)
        step = into_nan(functools.partial(fused, group_offset=offset))
        weighted = jnp.where(good, weights, jnp.nan)
        got = step(poisoned(a, good), part, jnp.asarray(sizes), weighted)
        assert_same(got, every, mine)
        others = np.setdiff1d(np.arange(700), np.arange(700)[mine])
        assert not bits(got[0])[others].any()
        assert (np.asarray(got[1])[others] == 2.0**-126).all()


@pytest.mark.parametrize("shape", [(4, 70, 256, 448), (32, 9, 128, 512), (3, 200, 384, 640)], ids=str)
def test_masked(shape):
    groups, rows, features, k = shape
    a, b = quantised(groups, rows, k, seed=0), quantised(groups, 2 * features, k, seed=1, block=(128, 128))
    weights = normal(2, groups, rows, dtype=F32)

    def plain(a: Any, b: Any, counts: Any, weights: Any) -> Any:
        h = jdg.m_grouped_fp8_gemm_nt_masked(a, b, counts, zero_rows=True)
        return jax.vmap(functools.partial(swiglu_quantize, transposed=False))(h, weights)

    def step(a: Any, b: Any, counts: Any, weights: Any, **options: Any) -> Any:
        got = m_masked_fp8_gemm_swiglu(a, b, counts, weights, **options)
        return got.values, got.scales

    whole = program(plain)
    for config in (None, *TILES.values()):
        run = program(functools.partial(step, config=config))
        for sizes in cases.masks(groups, rows).values():
            counted = np.arange(rows) < sizes[:, None]
            good = jnp.asarray(counted)
            given = poisoned(a, good), b, jnp.asarray(sizes), jnp.where(good, weights, jnp.nan)
            got = run(*given)
            assert_same(got, whole(a, b, jnp.asarray(sizes), weights), counted)


def test_vmap_is_a_loop():
    a, b, weights = operands(4, 333, 256, 448)
    stacked = jax.tree.map(lambda z: jnp.stack([z, jnp.flip(z, 0)]), a)
    sizes = jnp.array([[100, 0, 150, 60], [1, 200, 0, 132]], jnp.int32)
    got = program(jax.vmap(fused, (0, None, 0, None)))(stacked, b, sizes, weights)
    for i in range(2):
        one = jax.tree.map(lambda z, i=i: z[i], stacked)
        assert_same((got[0][i], got[1][i]), program(fused)(one, b, sizes[i], weights))


@pytest.mark.smoke
@pytest.mark.parametrize("layer", [moe_mlp, moe_mlp_decode])
def test_layers_give_the_same_bits_as_without(layer, monkeypatch):
    tokens, experts, hidden, inner, top_k = 77, 16, 512, 384, 4
    x, weights = normal(0, tokens, hidden), jax.nn.softmax(normal(1, tokens, top_k, dtype=F32))
    ids = random_ids(3, tokens, top_k, experts)
    w13 = quantised(experts, 2 * inner, hidden, seed=4, block=(128, 128))
    w2 = quantised(experts, hidden, inner, seed=5, block=(128, 128))
    given = (x, ids, weights, w13, w2)
    step = program(lambda *given: layer(*given))
    assert re.search(r"_g32_swiglu@", step.lower(*given).as_text())
    got = step(*given)
    monkeypatch.setattr(gated, "fits", lambda w13: False)
    jax.clear_caches()  # a layer's trace is kept
    step = program(lambda *given: layer(*given))
    assert not re.search(r"_g32_swiglu@", step.lower(*given).as_text())
    want = step(*given)
    np.testing.assert_array_equal(bits(got.astype(F32)), bits(want.astype(F32)))
