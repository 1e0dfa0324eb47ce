"""Weight gradients whose second operand has 128x128 scales: what is quantised bit for bit, each tile of the
K-grouped kernel against its dequantised operands, and the layers.

Run: pytest -m gpu tests/gpu/test_weight_gradient_gpu.py        (about 60 s)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm import moe
from jax_deepgemm.activation import swiglu_grad_quantize, swiglu_quantize
from jax_deepgemm.core.chip import H200
from jax_deepgemm.jit import KernelSource
from jax_deepgemm.ops.gemm.family import GemmConfig
from jax_deepgemm.ops.gemm.sm90.config import fit_stages
from jax_deepgemm.ops.grouped import op as ops
from jax_deepgemm.ops.grouped import recipe
from jax_deepgemm.ops.grouped.problem import GroupedProblem
from jax_deepgemm.ops.grouped.sm90.source import grouped_source
from jax_deepgemm.ops.quantize.blocks import ROWS, count_row_blocks, row_blocks
from jax_deepgemm.ops.quantize.fused import SQUARE, quantize_both
from jax_deepgemm.ops.quantize.groups import quantize_groups
from jax_deepgemm.ops.quantize.problem import QuantizeProblem
from tests.gpu.test_drawn_gpu import close, loads, pulled, routing, weights
from tests.gpu.test_fused_gpu import assert_bits, draw, near, on_both
from tests.gpu.test_groups_gpu import CASES, COLUMNS, defined, used
from tests.shared import grouped_products as oracle
from tests.shared import moe_oracle
from tests.shared.gpu_programs import difference, program
from tests.shared.grouped_products import same
from tests.shared.grouped_programs import FP8_LIMIT, poisoned
from tests.shared.moe_oracle import normal

F32 = jnp.float32
TILES = ((64, 128), (64, 256), (128, 128), (128, 256), (192, 128), (256, 128))
SHAPES = ((200, 264), (136, 1160))
"""m and n: three blocks of columns, and so many that a tile's are not the first four."""
GROUPS, K = 9, 2600
OPTIONS = recipe.LayerOptions(weight_gradient="128x128")
ROUTED = moe.ExpertForm(weight_gradient="128x128")


def problem(m: int, n: int, out: str, add_c: bool, groups: int = GROUPS) -> GroupedProblem:
    blocks = count_row_blocks(K, groups)
    form: dict[str, Any] = {"out": out, "add_c": add_c, "whole_blocks": True, "b_scales": "block_slices"}
    sizes = {"groups": groups, "segments": groups, "k": blocks * ROWS, "expected": blocks * ROWS // groups}
    return GroupedProblem("inner", m=m, n=n, **sizes, **form)


def fitted(p: GroupedProblem, tile: tuple[int, int]) -> GemmConfig:
    config = fit_stages(p.gemm, GemmConfig(*tile, 0), H200)
    assert config is not None
    return config


def kernels() -> Iterator[QuantizeProblem | KernelSource]:
    """What the tables below need (kernels.py)."""
    for (sizes, rows), cols in ((case, cols) for case in CASES for cols in COLUMNS):
        blocks = count_row_blocks(rows, len(sizes))
        form: dict[str, Any] = {"transposed": True, "square_t": True}
        for x in ("bfloat16", "float32"):
            for indexed in (True, False):
                yield QuantizeProblem("quantize", rows, cols, x, blocks=blocks, indexed=indexed, **form)
            yield QuantizeProblem("swiglu", rows, cols, x, weighted=True, blocks=blocks, **form)
            yield QuantizeProblem("swiglu_grad", rows, 2 * cols, x, weighted=True, blocks=blocks, **form)
    for tile in TILES:
        for out, add_c in (("float32", True), ("bfloat16", False)):
            p = problem(*SHAPES[0], out, add_c)
            yield grouped_source(p, fitted(p, tile))


# Quantising -------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("cols", COLUMNS)
@pytest.mark.parametrize(("sizes", "rows"), CASES, ids=str)
def test_groups_bit_for_bit(sizes, rows, cols):
    table, count = np.asarray(row_blocks(jnp.array(sizes), rows)), used(sizes, rows)
    index = np.random.default_rng(0).integers(-2, 60, rows).astype(np.int32)
    groups = lambda *args: defined(count, quantize_groups(*args, block_t=SQUARE))  # noqa: E731
    for x_dtype in ("bfloat16", "float32"):
        x, source = draw((rows, cols), x_dtype), draw((50, cols), x_dtype, 1)
        x[table[:, 2].sum() :] = np.nan
        x[0, :3] = np.inf, -np.inf, np.nan
        assert_bits(*on_both(groups, x, table))
        assert_bits(*on_both(groups, source, table, index))


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (300, 264), (129, 1000), (257, 131)], ids=str)
@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
def test_both_bit_for_bit(shape, scale_format):
    both = functools.partial(quantize_both, block_t=SQUARE, scale_format=scale_format)
    for x_dtype in ("bfloat16", "float32"):
        assert_bits(*on_both(both, draw(shape, x_dtype)))
        assert_bits(*on_both(jax.vmap(both), draw((3, *shape), x_dtype)))


@pytest.mark.parametrize("cols", COLUMNS)
def test_swiglu(cols):
    sizes, rows = CASES[0]
    table, count = np.asarray(row_blocks(jnp.array(sizes), rows)), used(sizes, rows)
    for x_dtype in ("bfloat16", "float32"):
        h, dact = draw((rows, 2 * cols), x_dtype, spread=0.5), draw((rows, cols), x_dtype, 1, spread=0.5)
        weight = draw((rows,), "float32", 2, spread=0)
        for function, given in ((swiglu_quantize, (h, weight)), (swiglu_grad_quantize, (h, weight, dact))):
            square = functools.partial(function, block_t=SQUARE)
            near(lambda b, *args, f=square: defined(count, f(*args, blocks=b)), table, *given)


# The product ------------------------------------------------------------------------------------------------


@functools.cache
def operands(m: int, n: int) -> tuple[jax.Array, jax.Array]:
    """Magnitudes differ by block of rows and by feature."""
    size = np.exp2(np.random.default_rng(m).integers(-8, 8, (K // 32 + 1, 1))).repeat(32, 0)[:K]
    return normal(0, K, m) * size.astype(np.float32), normal(1, K, n) * size[::-1].astype(np.float32)


@functools.cache
def products(m: int, n: int, tile: tuple[int, int], out: str, add_c: bool) -> Any:
    """(sizes) -> how far the kernel's product, and the reference of exact numbers, are apart."""
    config = fitted(problem(m, n, out, add_c), tile)
    run = ops.K_GROUPED_FP8_BLOCK_ADD if add_c else ops.K_GROUPED_FP8_BLOCK

    @program
    def compare(dy: jax.Array, x: jax.Array, sizes: jax.Array, starts: jax.Array, counts: jax.Array) -> Any:
        groups = recipe.Groups.of(sizes, None)
        a, b = recipe.both(dy, groups, OPTIONS, "dy")[1], recipe.both(x, groups, OPTIONS, "x")[1]
        there = oracle.inside(starts, -(-counts // ROWS) * ROWS, a.values.shape[1])
        a, b = ((poisoned(q.values, there), poisoned(q.scales, there[::ROWS, None])) for q in (a, b))
        c = normal(2, GROUPS, m, n, dtype=getattr(jnp, out))
        arrays = (*a, *b, jnp.asarray(counts), groups.offset, *((c,) if add_c else ()))
        form = {"reduce_dtype": F32, "out_sharding": None, "num_sms": None, "out_dtype": np.dtype(out)}
        [d] = run(*arrays, rows_format="blocks", num_groups=GROUPS, config=config, **form)
        left, right = (
            oracle.dequantised(jdg.QuantizedArray(values, scales.T, block))
            for (values, scales), block in ((a, (1, ROWS)), (b, (ROWS, ROWS)))
        )
        want = oracle.k_grouped(left.T, right.T, starts, counts, K) + (c.astype(F32) if add_c else 0)
        errors = jax.vmap(difference)(d, want)
        return jnp.where(jnp.isfinite(d).all((1, 2)), errors, 1), d

    return compare


@pytest.mark.parametrize(("out", "add_c"), [("float32", True), ("bfloat16", False)], ids=str)
@pytest.mark.parametrize(
    ("shape", "tile"),
    [*((SHAPES[0], tile) for tile in TILES), (SHAPES[1], (128, 256)), (SHAPES[1], (256, 128))],
    ids=str,
)
def test_each_tile(shape, tile, out, add_c):
    compare = products(*shape, tile, out, add_c)
    dy, x = operands(*shape)
    one_block_each = np.arange(1, GROUPS + 1) * 14  # every number of instructions of a last block
    for name, sizes in {**loads(GROUPS, K), "short": one_block_each}.items():
        counts = oracle.place(sizes, K).counts
        at = oracle.place(counts, count_row_blocks(K, GROUPS) * ROWS, alignment=ROWS)
        errors, _ = compare(dy, x, jnp.asarray(counts), at.starts, at.counts)
        assert float(errors.max()) < FP8_LIMIT[out], (name, errors)


def test_twenty_runs_give_the_same_bits():
    shape = SHAPES[1]
    compare = products(*shape, (128, 256), "float32", True)
    counts = oracle.place(loads(GROUPS, K)["drawn"], K).counts
    at = oracle.place(counts, count_row_blocks(K, GROUPS) * ROWS, alignment=ROWS)
    run = lambda: compare(*operands(*shape), jnp.asarray(counts), at.starts, at.counts)[1]  # noqa: E731
    first = run()
    for _ in range(20):
        jax.block_until_ready([jnp.full((1 << 22,), jnp.nan) for _ in range(4)])
        assert same(run(), first)


# The layers -------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("layout", ["nk", "kn"])
@pytest.mark.parametrize("groups", [1, 8, 200])
def test_grouped_linear(groups, layout):
    rows, k, n = 1500, 512, 264
    w = normal(2, groups, n, k, dtype=F32, scale=k**-0.5)
    form: dict[str, Any] = {"weight_layout": layout, "weight_gradient": "128x128", "out_dtype": F32}
    stored = w if layout == "nk" else w.mT
    layer = pulled(lambda sizes, x, w: jdg.grouped_linear(x, w, sizes, **form))

    @program
    def plain(starts: jax.Array, counts: jax.Array, dy: jax.Array, x: jax.Array) -> jax.Array:
        dw = oracle.k_grouped(dy, x, starts, counts, rows)
        return dw if layout == "nk" else dw.mT

    for name, sizes in loads(groups, rows).items():
        at = oracle.place(sizes, rows)
        good = (at.index >= 0)[:, None]
        x, dy = (poisoned(normal(seed, rows, cols), good) for seed, cols in ((0, k), (1, n)))
        want = plain(at.starts, at.counts, jnp.where(good, dy, 0), jnp.where(good, x, 0))
        close(name, layer(sizes, (x, stored), dy)[2:], [want], 1e-3)


def test_vmap_of_grouped_linear():
    """Whole blocks of several matrices, as segments."""
    sizes = jnp.array([[130, 0, 7], [3, 200, 1]], jnp.int32)
    x, w = normal(0, 2, 256, 384), normal(1, 2, 3, 264, 384, scale=384**-0.5)

    def gradient(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        layer = functools.partial(jdg.grouped_linear, weight_gradient="128x128", out_dtype=F32)
        return jax.grad(lambda w: (layer(x, w, sizes) ** 2).sum())(w)

    got = program(jax.vmap(gradient))(x, w, sizes)
    for i, one in enumerate(zip(x, w, sizes, strict=True)):
        assert float(difference(got[i], program(gradient)(*one))) < 1e-9


@pytest.mark.parametrize("shape", [(300, 256, 264), (4096, 2048, 1024), (129, 136, 128)], ids=str)
def test_linear(shape):
    m, n, k = shape
    x, w, dy = normal(0, m, k), normal(1, n, k, dtype=F32, scale=k**-0.5), normal(2, m, n)
    layer = functools.partial(jdg.fp8_linear, weight_gradient="128x128")
    got = program(lambda x, w, dy: jax.vjp(layer, x, w)[1](dy))(x, w, dy)
    want = program(lambda x, w, dy: jax.vjp(oracle.dot32, x.astype(F32), w)[1](dy.astype(F32)))(x, w, dy)
    close("linear", got, want, 1e-3)


@pytest.mark.parametrize("experts", [1, 8, 100])
def test_moe_mlp(experts):
    w13, w2 = weights(experts)
    tokens, top_k, hidden = 700, 3, w13.shape[2]
    x, dy = normal(0, tokens, hidden), normal(4, tokens, hidden)
    arguments = (x, jax.nn.softmax(normal(1, tokens, top_k, dtype=F32)), w13, w2)
    layer = pulled(lambda ids, x, p, w13, w2: moe.moe_mlp(x, ids, p, w13, w2, form=ROUTED))
    exact = pulled(lambda ids, x, p, w13, w2: moe.moe_mlp(x, ids, p, w13, w2))
    plain = pulled(lambda ids, x, p, w13, w2: moe_oracle.moe_plain(x, ids, p, w13, w2))
    for name, sizes in loads(experts, tokens * top_k).items():
        ids = routing(experts, sizes)
        got = layer(ids, arguments, dy)
        close(name, got, plain(ids, arguments, dy), 3e-3)
        other = exact(ids, arguments, dy)
        assert all(same(one, two) for one, two in zip(got[:3], other[:3], strict=True))  # not weights'
        assert not any(np.asarray(dw)[sizes == 0].any() for dw in got[-2:])
