"""Quantising kernels on an H200: bit for bit the reference, which runs on the CPU; SwiGLU within a tolerance.

Run: pytest -m gpu tests/gpu/test_fused_gpu.py        (about a minute, kernels compiled anew)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm.activation import swiglu_grad_quantize, swiglu_quantize
from jax_deepgemm.ops.quantize.fused import quantize_both, quantize_weight
from jax_deepgemm.ops.quantize.problem import QuantizeProblem
from jax_deepgemm.ops.swiglu import reference as swiglu_reference

F32 = jnp.float32
BLOCKS = ((1, 128), (128, 128), (128, 1), (1, 32), (32, 32))
DTYPES = ("float8_e4m3fn", "float8_e5m2")
FORMATS = ("f32", "ue8m0")
INPUTS = ("bfloat16", "float16", "float32")
# Whole tiles, tails that are aligned, tails that are not, less than a tile, one row, many tiles; then
# tiles that a block has side by side, all inside or with tails.
SHAPES = (
    (256, 384),
    (136, 264),
    (129, 131),
    (5, 8),
    (1, 1),
    (1, 7168),
    (130, 100),
    (200, 1000),
    (1024, 2056),
    (33, 1024),
    (17, 7160),
    (47, 520),
    (19, 896),
    (35, 1021),
)
FORMAT_SHAPES = ((264, 392), (129, 131))
SPECIAL_SHAPES = ((264, 392), (131, 133), (19, 1000))
SWIGLU_SHAPES = ((256, 128), (136, 384), (264, 264), (129, 131), (5, 8), (1, 1), (1, 2048), (300, 1000))


def kernels() -> Iterator[QuantizeProblem]:
    """What the tables below need (kernels.py)."""
    alone = [{"block": block} for block in BLOCKS]
    both = [{"block": block, "transposed": True} for block in BLOCKS[:2]]
    for shapes, inputs, kinds in (
        (SHAPES, ("bfloat16",), alone),
        (SHAPES, ("bfloat16", "float32"), both),
        (SPECIAL_SHAPES, INPUTS, alone + both),
        (FORMAT_SHAPES, INPUTS, [kind | {"ue8m0": True} for kind in alone]),
        (FORMAT_SHAPES, INPUTS, alone),
    ):
        for shape, x, fp8, kind in itertools.product(shapes, inputs, DTYPES, kinds):
            yield QuantizeProblem("quantize", *shape, x, fp8, **kind)
    for (m, i), x, weighted in itertools.product(SWIGLU_SHAPES, ("bfloat16", "float32"), (True, False)):
        yield QuantizeProblem("swiglu", m, i, x, transposed=True, weighted=weighted)
        yield QuantizeProblem("swiglu_grad", m, 2 * i, x, transposed=True, weighted=weighted)


def draw(shape: tuple[int, ...], dtype: str = "bfloat16", seed: int = 0, spread: float = 2) -> np.ndarray:
    """Numbers over many magnitudes, within float16's range."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-spread, spread, shape)
    return np.clip(x, -6e4, 6e4).astype(np.float32).astype(jnp.dtype(dtype))


def with_specials(x: np.ndarray) -> np.ndarray:
    """NaN, infinities, -0, subnormals, and a block of zeros, here and there."""
    rng = np.random.default_rng(1)
    x, flat = x.copy(), None
    tiny = {"float16": 6e-8, "bfloat16": 1e-40, "float32": 1e-44}[x.dtype.name]
    flat = x.reshape(-1)
    for value in (np.nan, -np.nan, np.inf, -np.inf, -0.0, 0.0, tiny, -tiny):
        flat[rng.integers(0, flat.size, max(flat.size // 200, 1))] = value
    x[..., :128, :128] = 0
    return x


def on_both(function: Callable[..., Any], *arrays: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Results on the GPU and on the CPU."""
    step, cpu = jax.jit(function), jax.devices("cpu")[0]
    got = jax.tree.leaves(step(*jax.device_put(arrays, jax.devices()[0])))
    want = jax.tree.leaves(step(*jax.device_put(arrays, cpu)))
    return [np.asarray(x) for x in got], [np.asarray(x) for x in want]


def assert_bits(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    assert len(got) == len(want)
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        word = {1: np.uint8, 4: np.uint32}[one.dtype.itemsize]
        wrong = np.argwhere(one.view(word) != other.view(word))
        first = [(tuple(at), one[tuple(at)], other[tuple(at)]) for at in wrong[:5]]
        assert not len(wrong), f"result {i} {one.shape}: {len(wrong)} differ, as {first}"


def quantize(block: tuple[int, int], dtype: str, scale_format: str = "f32") -> Callable[..., Any]:
    return functools.partial(jdg.quantize, block=block, dtype=getattr(jnp, dtype), scale_format=scale_format)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_quantize_bit_for_bit(block, shape):
    for dtype in DTYPES:
        assert_bits(*on_both(quantize(block, dtype), draw(shape)))


@pytest.mark.parametrize("x_dtype", INPUTS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_quantize_types_and_formats(block, x_dtype):
    for shape in FORMAT_SHAPES:
        for dtype in DTYPES:
            for scale_format in FORMATS:
                x = draw(shape, x_dtype)
                assert_bits(*on_both(quantize(block, dtype, scale_format), x))


@pytest.mark.parametrize("x_dtype", INPUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_specials(dtype, x_dtype):
    for shape in SPECIAL_SHAPES:
        x = with_specials(draw(shape, x_dtype))
        for block in BLOCKS:
            assert_bits(*on_both(quantize(block, dtype), x))
        assert_bits(*on_both(functools.partial(quantize_both, dtype=getattr(jnp, dtype)), x))
        assert_bits(*on_both(functools.partial(quantize_weight, dtype=getattr(jnp, dtype)), x))


@pytest.mark.smoke
def test_extreme_magnitudes():
    tops = np.array([3e38, 1e30, 448.0, 1e-4, 1e-20, 7e-34, 6e-36, 5e-36, 1e-38, 1e-44, 0.0], np.float32)
    x = np.repeat(tops[:, None] * np.linspace(-1, 1, 128, dtype=np.float32), 128, axis=0)
    for block in BLOCKS:
        for dtype in DTYPES:
            for scale_format in FORMATS:
                assert_bits(*on_both(quantize(block, dtype, scale_format), x))


@pytest.mark.smoke
def test_min_amax():
    x = draw((264, 392)) * np.float32(1e-6)
    for block in BLOCKS:
        function = functools.partial(jdg.quantize, block=block, min_amax=1e-4)
        assert_bits(*on_both(function, x))


def test_every_rounding():
    """Scales of a million different maxima, and values between all neighbouring FP8 numbers."""
    rng = np.random.default_rng(0)
    tops = (rng.integers(0, 1 << 23, 1 << 13, dtype=np.uint32) | np.uint32(127 << 23)).view(np.float32)
    x = tops[:, None] * rng.uniform(-1, 1, (1 << 13, 128)).astype(np.float32)
    x[:, 0] = tops
    for dtype in DTYPES:
        assert_bits(*on_both(quantize((1, 128), dtype), x))


@pytest.mark.parametrize("lead", [(3,), (2, 3)], ids=str)
def test_leading_dimensions(lead):
    for block in BLOCKS:
        for shape in ((136, 200), (19, 1000), (21, 1021)):
            assert_bits(*on_both(quantize(block, "float8_e4m3fn"), draw((*lead, *shape))))
    assert_bits(*on_both(quantize_weight, draw((*lead, 136, 200))))
    assert_bits(*on_both(quantize_weight, draw((*lead, 131, 133))))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_and_weight_bit_for_bit(shape):
    for dtype in DTYPES:
        for x_dtype in ("bfloat16", "float32"):
            x = draw(shape, x_dtype)
            for function in (quantize_both, quantize_weight):
                assert_bits(*on_both(functools.partial(function, dtype=getattr(jnp, dtype)), x))


@pytest.mark.parametrize("rows", [-3, 0, 1, 127, 128, 200, 264, 1000])
def test_rows_beyond_the_limit_are_zeros_whatever_they_hold(rows):
    x = draw((264, 136))
    x[max(rows, 0) :] = np.nan
    assert_bits(*on_both(quantize_both, x, np.int32(rows)))
    h, dact, weight = draw((264, 256), spread=0), draw((264, 128), spread=0), np.ones(264, np.float32)
    for array in (h, dact, weight):
        array[max(rows, 0) :] = np.nan
    near(swiglu_quantize, h, weight, np.int32(rows))
    near(swiglu_grad_quantize, h, weight, dact, np.int32(rows))


def test_vmap_over_matrices_and_limits():
    x, rows = draw((3, 136, 200)), np.array([[136], [7], [0]], np.int32)
    assert_bits(*on_both(jax.vmap(quantize_both), x, rows))
    assert_bits(*on_both(jax.vmap(quantize_both, (None, 0)), x[0], rows))
    assert_bits(*on_both(jax.vmap(quantize_both, (0, None)), x, rows[1]))


@pytest.mark.parametrize("shape", [(0, 128), (128, 0), (0, 0), (0, 3, 128)], ids=str)
def test_empty(shape):
    for block in BLOCKS:
        assert_bits(*on_both(quantize(block, "float8_e4m3fn"), np.zeros(shape, np.float32)))
    if len(shape) == 2:
        assert_bits(*on_both(quantize_both, np.zeros(shape, np.float32)))
        h = np.zeros((shape[0], 2 * shape[1]), np.float32)
        near(swiglu_quantize, h, np.ones(shape[0], np.float32))
        near(swiglu_grad_quantize, h, np.ones(shape[0], np.float32), h[:, : shape[1]])


def test_results_are_written_whole_and_nothing_else():
    """Between other buffers full of NaN, and again and again: the same bits."""
    x = draw((1000, 2056))
    step = jax.jit(quantize_both)
    first = [np.asarray(part) for part in step(x)]
    for _ in range(20):
        noise = [jnp.full((1 << 20,), jnp.nan) for _ in range(4)]
        jax.block_until_ready(noise)
        del noise
        assert_bits([np.asarray(part) for part in step(x)], first)


# SwiGLU -------------------------------------------------------------------------------------------------


def near(function: Callable[..., Any], *arrays: Any, tolerance: float = 0.07) -> None:
    """Scales are equal within float32's exp; values within a step of FP8, nearly all of them equal."""
    got, want = on_both(function, *arrays)
    assert len(got) == len(want)
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        mine, theirs = one.astype(np.float32), other.astype(np.float32)
        if one.dtype.itemsize == 4:
            scale = np.abs(theirs).max(initial=1e-30)
            assert np.abs(mine - theirs).max(initial=0) <= 1e-5 * scale, (
                i,
                np.abs(mine - theirs).max() / scale,
            )
            continue
        tiny = 2.0**-9 if one.dtype == ml_dtypes.float8_e4m3fn else 2.0**-16
        step = np.maximum(np.abs(theirs) * (tolerance * (2 if "e5m2" in one.dtype.name else 1) * 2), tiny)
        wrong = np.argwhere(~(np.abs(mine - theirs) <= step))
        first = [(tuple(at), mine[tuple(at)], theirs[tuple(at)]) for at in wrong[:5]]
        assert not len(wrong), f"result {i} {one.shape}: {len(wrong)} differ, as {first}"
        assert (mine == theirs).mean() > 0.99 if one.size > 1000 else True, (i, (mine == theirs).mean())


@pytest.mark.parametrize("weighted", [True, False], ids=("weight", "plain"))
@pytest.mark.parametrize("shape", SWIGLU_SHAPES, ids=str)
def test_swiglu(shape, weighted):
    m, i = shape
    for x_dtype in ("bfloat16", "float32"):
        h, dact = draw((m, 2 * i), x_dtype, spread=0.5), draw((m, i), x_dtype, 1, spread=0.5)
        weight = draw((m,), "float32", 2, spread=0) if weighted else None
        near(swiglu_quantize, h, weight)
        near(swiglu_grad_quantize, h, weight, dact)


@pytest.mark.parametrize("transposed", [True, False], ids=("both", "straight"))
def test_swiglu_options(transposed):
    h, dact = draw((264, 512), spread=0.5), draw((264, 256), seed=1, spread=0.5)
    weight = draw((264,), "float32", 2, spread=0)
    for dtype in DTYPES:
        for scale_format in FORMATS:
            options = {
                "transposed": transposed,
                "dtype": getattr(jnp, dtype),
                "scale_format": scale_format,
            }
            near(functools.partial(swiglu_quantize, **options), h, weight)
            near(functools.partial(swiglu_grad_quantize, **options), h, weight, dact)


@pytest.mark.smoke
def test_swiglu_vmap():
    h, dact = draw((3, 136, 512), spread=0.5), draw((3, 136, 256), seed=1, spread=0.5)
    weight, rows = draw((136,), "float32", 2, spread=0), np.array([136, 50, 0], np.int32)
    near(jax.vmap(swiglu_quantize, (0, None, 0)), h, weight, rows)
    near(jax.vmap(swiglu_grad_quantize, (0, None, 0, 0)), h, weight, dact, rows)
    near(jax.vmap(swiglu_grad_quantize, (0, None, None, 0)), h, weight, dact[0], rows)


@pytest.mark.smoke
def test_swiglu_many_tiles_against_float32():
    """More tiles than SMs, so that the gradient's blocks walk; against dequantised float32 on the GPU."""
    m, i = 4096, 2048
    key = jax.random.split(jax.random.key(0), 3)
    h, dact = (
        jax.random.normal(key[0], (m, 2 * i), jnp.bfloat16),
        jax.random.normal(key[1], (m, i), jnp.bfloat16),
    )
    weight = jax.random.uniform(key[2], (m,))
    wide = functools.partial(jnp.repeat, repeats=128, axis=-1)

    @jax.jit
    def errors(h: jax.Array, weight: jax.Array, dact: jax.Array) -> list[jax.Array]:
        act = swiglu_reference.act(h, weight, None)
        dh, dweight = swiglu_reference.grad(h, weight, dact, None)
        found = []
        for exact, parts in (
            (act, swiglu_quantize(h, weight)),
            (dh, swiglu_grad_quantize(h, weight, dact)),
        ):
            values, scales, values_t, scales_t, *rest = parts
            straight = values.astype(F32) * wide(scales)
            turned = values_t.T.astype(F32) * jnp.repeat(scales_t, 128, axis=0)
            found += [jnp.linalg.norm(one - exact) / jnp.linalg.norm(exact) for one in (straight, turned)]
            found += [jnp.linalg.norm(one - dweight) / jnp.linalg.norm(dweight) / 1e4 for one in rest]
        return found

    found = [float(error) for error in errors(h, weight, dact)]
    assert all(1e-3 < error < 0.04 for error in found[:4]), found
    assert found[4] < 1e-9, found


def test_swiglu_repeats_its_bits():
    h, dact = draw((2000, 1024), spread=0), draw((2000, 512), seed=1, spread=0)
    weight = draw((2000,), "float32", 2, spread=0)
    for step in (jax.jit(swiglu_quantize), jax.jit(lambda h, w: swiglu_grad_quantize(h, w, dact))):
        first = [np.asarray(part) for part in step(h, weight)]
        for _ in range(20):
            assert_bits([np.asarray(part) for part in step(h, weight)], first)
