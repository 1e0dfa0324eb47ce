"""Epilogues of grouped GEMMs on an H200: bit for bit a float32 product of the same tiles and then the same in
float32, or, behind an activation, within its fast exponential; NaN where nothing counts.

Run: pytest -m gpu tests/gpu/test_grouped_epilogue_gpu.py        (under a minute, kernels compiled anew)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm import Epilogue
from jax_deepgemm.activation import GPT_OSS, Activation
from jax_deepgemm.ops.gemm.epilogue import check_epilogue
from jax_deepgemm.ops.gemm.family import GemmConfig
from jax_deepgemm.ops.grouped.problem import GroupedProblem
from jax_deepgemm.quantization import QuantizedArray
from tests.shared import grouped_cases as cases
from tests.shared import grouped_products as oracle
from tests.shared.epilogue_oracle import with_epilogue
from tests.shared.gpu_programs import program
from tests.shared.moe_oracle import normal

BF16, F32 = jnp.bfloat16, jnp.float32
PAIRS = Activation(interleaved=True)
ALPHA = 0.25  # a power of two, so that it does not matter whether its product is rounded
# groups, rows, n, k: one group, tails in every dimension, unaligned and odd rows of D, few rows, many groups.
SHAPES = (
    (1, 65, 256, 128),
    (4, 333, 264, 448),
    (8, 1031, 400, 640),
    (3, 300, 257, 130),
    (64, 70, 512, 512),
    (7, 900, 1040, 200),
)
ACTIVATIONS = (None, "silu", "gelu", "relu2", "swiglu", PAIRS, GPT_OSS)
KINDS = ("fp8", "rows", "nt", "nn")
BF16_TYPES = {"a": "bf16", "b": "bf16", "b_scales": "none"}
CLIPPED = Activation(limit=7.0, alpha=1.702, shift=1.0)
HALVES = {height: GemmConfig(height, 256, 4, slabs=2, gated=True) for height in (64, 128)}
TILES = {
    "128x256": GemmConfig(128, 256, 4, slabs=2),
    "64x256": GemmConfig(64, 256, 4, slabs=2),
    "128x128": GemmConfig(128, 128, 4, slabs=2),
    "turns": GemmConfig(128, 192, 5, slabs=2, ping_pong=True),
}


def cases_in_float64() -> Iterator[tuple[tuple[int, int, int, int], Any, str, Any]]:
    """Shape, activation, and in turn a kind of operand and of result."""
    for i, shape in enumerate(SHAPES):
        for j, activation in enumerate(ACTIVATIONS):
            kind = KINDS[(i + j) % 4]
            if shape[2] % 2 == 0 or (j < 4 and kind != "nn"):
                yield shape, activation, kind, F32 if j % 2 else BF16


def kernels() -> Iterator[GroupedProblem]:
    """What the chosen configurations of `test_in_float64` need (kernels.py)."""
    for (groups, rows, n, k), activation, kind, out in cases_in_float64():
        fp8 = kind in ("fp8", "rows")
        apart = kind == "nt" or (kind == "fp8" and n % 256 == 0)
        epilogue = Epilogue(ALPHA, jnp.zeros((groups, n)), activation)
        checked = check_epilogue("fp8" if fp8 else "bf16", epilogue, n, None, groups, apart=apart)
        types = (
            {"b_scales": "vector" if kind == "rows" else "block"} if fp8 else dict(BF16_TYPES, layout=kind)
        )
        step = 16 if fp8 else 8
        yield GroupedProblem(
            "rows",
            groups=groups,
            m=rows,
            n=n,
            k=-(-k // step) * step,
            expected=max(1, rows // groups),
            segments=groups,
            out="float32" if checked.halves else jnp.dtype(out).name,
            finish=checked.finish,
            gated=checked.finish.apart,
            **types,
        )


def bits(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def into_nan(function: Any) -> Any:
    """The function, whose results take the place of donated buffers of NaN: every element is written."""
    step = program(lambda _, *x: function(*x), donate_argnums=0, keep_unused=True)

    def run(*operands: Any) -> Any:
        shapes = jax.eval_shape(function, *operands)
        return step(jax.tree.map(lambda one: jnp.full(one.shape, jnp.nan, one.dtype), shapes), *operands)

    return run


@functools.cache
def operands(kind: str, groups: int, rows: int, n: int, k: int, masked: bool = False) -> tuple[Any, Any]:
    a, b = normal(0, *((groups, rows) if masked else (rows,)), k), normal(1, groups, n, k)
    if kind in ("fp8", "rows"):
        block = (128, 128) if kind == "fp8" else (1, 128)
        return program(jdg.quantize)(a), program(functools.partial(jdg.quantize, block=block))(b)
    return a, b if kind == "nt" else jnp.swapaxes(b, 1, 2)


def gemm(kind: str, masked: bool = False) -> Any:
    if masked:
        return jdg.m_grouped_bf16_gemm_nt_masked if kind == "nt" else jdg.m_grouped_fp8_gemm_nt_masked
    if kind in ("nt", "nn"):
        return getattr(jdg, f"m_grouped_bf16_gemm_{kind}_contiguous")
    return jdg.m_grouped_fp8_gemm_nt_contiguous


def poisoned(a: Any, good: jax.Array) -> Any:
    """NaN in the rows that are not good."""
    if not isinstance(a, QuantizedArray):
        return jnp.where(good[..., None], a, jnp.nan)
    values = jnp.where(good[..., None], a.values, jnp.full((), jnp.nan, a.values.dtype))
    return QuantizedArray(values, jnp.where(good[..., None], a.scales, jnp.nan), a.block)


def bias_of(groups: int, n: int, sizes: Any) -> jax.Array:
    """NaN of groups without rows."""
    return jnp.where(jnp.asarray(sizes > 0)[:, None], normal(3, groups, n, dtype=F32), jnp.nan)


def group_of_rows(sizes: np.ndarray, rows: int) -> np.ndarray:
    return oracle.place(sizes, rows).index


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("tile", "kind", "shape"),
    [
        *((tile, "fp8", shape) for tile in ("128x256", "64x256", "128x128") for shape in SHAPES[1:3]),
        *((tile, "nt", SHAPES[2]) for tile in TILES),
    ],
    ids=str,
)
def test_bits_of_a_float32_product_of_the_same_tiles(tile, kind, shape):
    """alpha, bias and one rounding; groups of every legal pattern, and of two that are not."""
    groups, rows, n, _ = shape
    a, b, config = *operands(kind, *shape), TILES[tile]
    run = functools.partial(gemm(kind), config=config)
    step = into_nan(lambda a, b, sizes, bias: run(a, b, sizes, epilogue=Epilogue(ALPHA, bias)))
    whole = program(functools.partial(run, out_dtype=F32))
    for name, sizes in cases.patterns(groups, rows).items():
        index = group_of_rows(sizes, rows)
        bias = bias_of(groups, n, sizes)
        got = step(poisoned(a, jnp.asarray(index >= 0)), b, jnp.asarray(sizes), bias)
        sums = np.asarray(whole(a, b, jnp.asarray(sizes)))
        want = sums * np.float32(ALPHA) + np.asarray(bias)[index]
        want = np.where(index[:, None] < 0, 0, want)
        np.testing.assert_array_equal(bits(got), bits(jnp.asarray(want).astype(BF16)), name)


@pytest.mark.parametrize(("shape", "activation", "kind", "out"), list(cases_in_float64()), ids=str)
def test_in_float64(shape, activation, kind, out):
    """Every kind of operand and result in turn, with drawn sizes of groups."""
    groups, rows, n, _ = shape
    a, b = operands(kind, *shape)
    step = into_nan(
        lambda a, b, sizes, bias: gemm(kind)(
            a, b, sizes, out_dtype=out, epilogue=Epilogue(ALPHA / 8, bias, activation)
        )
    )
    rng = np.random.default_rng(0)
    for skew in (0.3, 100.0):
        sizes = rng.multinomial(max(rows - 7, 1), rng.dirichlet([skew] * groups)).astype(np.int32)
        index, bias = group_of_rows(sizes, rows), bias_of(groups, n, sizes)
        got = step(poisoned(a, jnp.asarray(index >= 0)), b, jnp.asarray(sizes), bias)
        left, right = (np.asarray(_wide(x), np.float64) for x in (a, b))
        right = np.swapaxes(right, 1, 2) if kind == "nn" else right
        sums = np.zeros((rows, n))
        for group in range(groups):
            sums[index == group] = left[index == group] @ right[group].T
        plus = np.where(index[:, None] < 0, 0, np.asarray(bias, np.float64)[index])
        want = np.where(index[:, None] < 0, 0, with_epilogue(sums, ALPHA / 8, plus, activation))
        assert_near(got, want, ALPHA / 8 * np.abs(sums).max(), activation, kind, out)
        assert not np.asarray(got, np.float32)[index < 0].any()


def _wide(x: Any) -> jax.Array:
    return oracle.dequantised(x) if isinstance(x, QuantizedArray) else x.astype(F32)


def assert_near(got: Any, want: np.ndarray, sums: float, activation: Any, kind: str, out: Any) -> None:
    of_sums = 3e-4 if kind in ("fp8", "rows") else 2e-5  # FP8 products are summed with 14 bits
    limit = getattr(activation, "limit", None)
    slope = 2.4 * (min(sums + 4, limit + 1) if limit else sums + 4)
    once = {BF16: 2.0**-8, F32: 2.0**-21}[out]
    error = np.abs(np.asarray(got, np.float64) - want)
    assert np.all(error <= once * np.abs(want) + slope * of_sums * max(sums, 1)), error.max()


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("kind", "n", "activation", "tile"),
    [
        ("fp8", 400, "silu", GemmConfig(128, 128, 4, slabs=2)),
        ("fp8", 400, None, GemmConfig(64, 256, 4, slabs=2)),
        ("nt", 400, "gelu", GemmConfig(128, 128, 4, slabs=2)),
        ("nt", 416, PAIRS, GemmConfig(128, 256, 4, slabs=2)),
        ("nt", 416, "swiglu", HALVES[128]),
        ("fp8", 512, "geglu", HALVES[128]),
        ("fp8", 768, CLIPPED, HALVES[64]),
    ],
    ids=lambda part: str(part).replace("/", " per "),  # a slash would end the name of a file
)
def test_quantised_results(kind, n, activation, tile):
    """The bits of the float32 result of one configuration, quantised, in buffers of NaN."""
    groups, rows, k = 8, 1031, 640
    a, b = operands(kind, groups, rows, n, k)

    def run(a: Any, b: Any, sizes: Any, bias: Any, out_scales: Any = None, **options: Any) -> Any:
        epilogue = Epilogue(0.03, bias, activation, out_scales)
        return gemm(kind)(a, b, sizes, epilogue=epilogue, **options)

    step = into_nan(functools.partial(run, config=tile, out_scales=(1, 128)))
    of_float32 = HALVES[64] if tile == HALVES[128] else tile
    whole = program(lambda *x: jdg.quantize(run(*x, config=of_float32, out_dtype=F32)))
    for name, sizes in cases.patterns(groups, rows).items():
        index = group_of_rows(sizes, rows)
        given = b, jnp.asarray(sizes), bias_of(groups, n, sizes)
        got = step(poisoned(a, jnp.asarray(index >= 0)), *given)
        want = whole(a, *given)
        np.testing.assert_array_equal(bits(got.values), bits(want.values), name)
        np.testing.assert_array_equal(bits(got.scales), bits(want.scales), name)
        assert not bits(got.values)[index < 0].any()


@pytest.mark.smoke
@pytest.mark.parametrize("zero_rows", [False, True])
@pytest.mark.parametrize(
    ("kind", "activation", "scales"),
    [
        ("fp8", "silu", None),
        ("fp8", PAIRS, None),
        ("nt", GPT_OSS, None),
        ("nt", PAIRS, (1, 128)),
        ("nt", "swiglu", None),
        ("fp8", CLIPPED, None),
        ("fp8", "swiglu", (1, 128)),
        ("fp8", "gelu", (1, 128)),
    ],
    ids=str,
)
def test_masked(kind, activation, scales, zero_rows):
    """The bits of the contiguous product of the same rows, group by group."""
    groups, rows, n, k = 5, 100, 512, 320
    wide = "128x256" if kind == "nt" and activation in (PAIRS, GPT_OSS) else "128x128"
    tile = HALVES[64] if activation in ("swiglu", CLIPPED) else TILES[wide]
    a, b = operands(kind, groups, rows, n, k, True)
    step = into_nan(
        lambda a, b, counts, bias: gemm(kind, True)(
            a,
            b,
            counts,
            zero_rows=zero_rows,
            config=tile,
            epilogue=Epilogue(0.1, bias, activation, scales),
        )
    )
    flat = jax.tree.map(lambda x: x.reshape(groups * rows, *x.shape[2:]), a)
    whole = program(
        lambda a, b, starts, bias: gemm(kind)(
            a, b, m_indices=starts, config=tile, epilogue=Epilogue(0.1, bias, activation, scales)
        )
    )
    for name, sizes in cases.masks(groups, rows).items():
        counted = np.arange(rows) < sizes[:, None]
        index = np.where(counted, np.arange(groups)[:, None], -1).astype(np.int32).reshape(-1)
        bias = bias_of(groups, n, sizes)
        got = step(poisoned(a, jnp.asarray(counted)), b, jnp.asarray(sizes), bias)
        want = whole(flat, b, jnp.asarray(index), bias)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            other = bits(other).reshape(one.shape)
            np.testing.assert_array_equal(bits(one)[counted], other[counted], name)
            if zero_rows:
                np.testing.assert_array_equal(bits(one), other, name)


def test_twenty_runs_with_few_sms_give_the_same_bits():
    """Each block of threads has many tiles, whose epilogues run beside the next one's first product."""
    groups, rows, n, _ = shape = (8, 1031, 1040, 640)
    sizes = jnp.asarray(cases.patterns(groups, rows)["tail"])
    for kind, tile in (("fp8", "128x256"), ("nt", "turns")):
        config = dataclasses.replace(TILES[tile], slabs=0)  # pairs leave too few columns for TMA
        a, b = operands(kind, *shape)
        given = a, b, sizes, normal(3, groups, n, dtype=F32)

        def run(*x: Any, kind: str = kind, config: Any = config, **options: Any) -> Any:
            return gemm(kind)(*x[:3], config=config, epilogue=Epilogue(0.1, x[3], PAIRS), **options)

        want = program(run)(*given)
        for sms in (1, 3, 8):
            step = into_nan(functools.partial(run, num_sms=sms))
            for _ in range(20):
                np.testing.assert_array_equal(bits(step(*given)), bits(want))


@pytest.mark.parametrize("height", HALVES)
@pytest.mark.parametrize(("kind", "n"), [("fp8", 768), ("nt", 402), ("nt", 328)])
def test_gate_and_up_in_halves(kind, n, height):
    """Within an exponential's error of the float32 product of other tiles; 201 features are odd rows of D."""
    groups, rows, k = 8, 1031, 640
    a, b = operands(kind, groups, rows, n, k)
    tile = HALVES[height] if n // 2 * 2 % 16 == 0 else dataclasses.replace(HALVES[height], slabs=0)
    run = functools.partial(gemm(kind), config=tile)
    step = into_nan(lambda a, b, s, bias: run(a, b, s, epilogue=Epilogue(0.03, bias, CLIPPED)))
    whole = program(functools.partial(gemm(kind), out_dtype=F32))
    for name, sizes in cases.patterns(groups, rows).items():
        index, bias = group_of_rows(sizes, rows), bias_of(groups, n, sizes)
        got = step(poisoned(a, jnp.asarray(index >= 0)), b, jnp.asarray(sizes), bias)
        sums = np.asarray(whole(a, b, jnp.asarray(sizes)), np.float64)
        plus = np.where(index[:, None] < 0, 0, np.asarray(bias, np.float64)[index])
        want = np.where(index[:, None] < 0, 0, with_epilogue(sums, 0.03, plus, CLIPPED))
        error = np.abs(np.asarray(got, np.float64) - want)
        assert np.all(error <= 2.0**-8 * np.abs(want) + 1e-3), (name, error.max())
        assert not np.asarray(got, np.float32)[index < 0].any()


def test_a_batch_has_its_own_biases():
    """With b mapped a batch is more groups; with b shared it is a loop; so it is where alpha is mapped."""
    groups, rows, n, _ = shape = (4, 333, 264, 448)
    a, b = operands("nt", *shape)
    bs, biases = jnp.stack([b, b[::-1]]), normal(3, 2, groups, n, dtype=F32)
    alphas, sizes = jnp.array([0.1, -2.0]), jnp.asarray(cases.patterns(groups, rows)["tail"])

    def run(a: Any, b: Any, bias: Any, alpha: Any) -> Any:
        return gemm("nt")(a, b, sizes, config=TILES["128x128"], epilogue=Epilogue(alpha, bias, "relu2"))

    for axes in ((None, 0, 0, None), (None, None, 0, None), (None, 0, None, 0)):
        given = [
            x if on is None else y
            for on, x, y in zip(axes, (a, b, biases[0], alphas[0]), (a, bs, biases, alphas))
        ]
        got = program(jax.vmap(run, axes))(*given)
        for i in range(2):
            one = [x if on is None else x[i] for on, x in zip(axes, given)]
            np.testing.assert_array_equal(bits(got[i]), bits(program(run)(*one)))


def test_gradients_are_those_of_plain_jax():
    """Of A, B and the bias, beside float32 products of one expert after the other."""
    groups, rows, n, k = 4, 333, 264, 448
    a, b = operands("nt", groups, rows, n, k)
    sizes = np.asarray([100, 0, 150, 60], np.int32)
    index, bias = jnp.asarray(group_of_rows(sizes, rows)), normal(3, groups, n, dtype=F32)

    def loss(run: Any) -> Any:
        return program(jax.grad(lambda a, b, bias: jnp.sin(run(a, b, bias)).sum(), (0, 1, 2)))

    def fused(a: Any, b: Any, bias: Any) -> Any:
        epilogue = Epilogue(0.05, bias, "silu")
        return gemm("nt")(a, b, jnp.asarray(sizes), out_dtype=F32, epilogue=epilogue)

    def plain(a: Any, b: Any, bias: Any) -> Any:
        hot = jax.nn.one_hot(index, groups)
        sums = jnp.einsum("mg,mk,gnk->mn", hot, a.astype(F32), b.astype(F32), precision="highest")
        return jnp.where(index[:, None] < 0, 0, jax.nn.silu(0.05 * sums + hot @ bias))

    for got, want in zip(loss(fused)(a, b, bias), loss(plain)(a, b, bias), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert np.abs(got - want).max() <= 2.0**-6 * np.abs(want).max()


@pytest.mark.smoke
def test_group_offset():
    """B holds two of six groups; rows of the others are zeros, and may be NaN in A."""
    groups, rows, n, _ = shape = (6, 700, 272, 512)
    a, b = operands("fp8", *shape)
    sizes = np.asarray(cases.patterns(groups, rows)["tail"])
    index, bias = group_of_rows(sizes, rows), normal(3, groups, n, dtype=F32)
    tile = GemmConfig(128, 128, 4, slabs=2)

    def run(a: Any, b: Any, sizes: Any, bias: Any, **options: Any) -> Any:
        return gemm("fp8")(a, b, sizes, config=tile, epilogue=Epilogue(0.1, bias, "gelu"), **options)

    every = program(run)(a, b, jnp.asarray(sizes), bias)
    for offset in (0, 3, 4):
        mine = (index >= offset) & (index < offset + 2)
        part = jax.tree.map(lambda z, at=offset: z[at : at + 2], b)
        step = into_nan(functools.partial(run, group_offset=offset))
        got = step(poisoned(a, jnp.asarray(mine)), part, jnp.asarray(sizes), bias[offset : offset + 2])
        np.testing.assert_array_equal(bits(got), np.where(mine[:, None], bits(every), 0))


def test_shares_are_those_of_the_dense_product():
    """One group of all rows is a dense product with an epilogue, bit for bit."""
    a, b = operands("fp8", 1, 300, 400, 640)
    bias, tile = normal(3, 1, 400, dtype=F32), GemmConfig(128, 128, 4, slabs=2)
    got = program(
        lambda a, b, bias: gemm("fp8")(
            a, b, jnp.array([300]), config=tile, epilogue=Epilogue(0.1, bias, PAIRS)
        )
    )(a, b, bias)
    one = dataclasses.replace(b, values=b.values[0], scales=b.scales[0])
    want = program(
        lambda a, b, bias: jdg.fp8_gemm_nt(a, b, config=tile, epilogue=Epilogue(0.1, bias, PAIRS))
    )(a, one, bias[0])
    np.testing.assert_array_equal(bits(got), bits(want))
