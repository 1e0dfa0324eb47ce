"""FP4 casts, against NumPy on bits: the formulas of DeepGEMM's helpers, a number at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm import deep_gemm
from jax_deepgemm.deep_gemm.utils import fp4
from tests.shared.arrays import normal

to_fp4 = jax.jit(deep_gemm.per_token_cast_to_fp4, static_argnums=(1, 2, 3))
from_fp4 = jax.jit(deep_gemm.cast_back_from_fp4, static_argnums=(2, 3))
NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def ceil_to_power(x: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.float32(1), exponent - (mantissa == 0.5)).astype(np.float32)


def encoded(x: np.float32) -> int:
    """The nearest number; of two that are equally near the smaller, and no negative zero."""
    distance = np.abs(np.abs(np.float64(x)) - NUMBERS.astype(np.float64))
    code = int(np.argmin(distance))  # the first, so the smaller
    return code | (8 if x < 0 and code else 0)


def cast(x: np.ndarray, ue8m0: bool, gran: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = x.shape
    scales = np.empty((rows, -(-columns // gran)), np.float32)
    codes = np.empty(x.shape, np.uint8)
    for i, j in np.ndindex(scales.shape):
        part = x[i, j * gran : (j + 1) * gran].astype(np.float32)
        amax = np.maximum(np.abs(part).max(), np.float32(1e-4))
        scale = np.float32(np.float64(amax) / 6)
        scales[i, j] = ceil_to_power(scale) if ue8m0 else scale
        inverse = np.float32(1) / scales[i, j]
        codes[i, j * gran : (j + 1) * gran] = [encoded(one * inverse) for one in part]
    return (codes[:, ::2] | codes[:, 1::2] << 4).view(np.int8), scales


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize(("gran", "columns", "dtype"), [(32, 96, "bfloat16"), (128, 200, "float32")])
def test_per_token_cast_to_fp4(ue8m0: bool, gran: int, columns: int, dtype: str) -> None:
    x = np.array(normal(0, 5, columns, dtype=jnp.dtype(dtype)))
    x[1] *= np.asarray(1e-3, x.dtype)
    x[2] = 0
    values, scales = to_fp4(x, ue8m0, gran)
    want = cast(x, ue8m0, gran)
    np.testing.assert_array_equal(values, want[0])
    np.testing.assert_array_equal(scales, want[1])
    codes = np.stack([want[0] & 15, want[0].view(np.uint8) >> 4], -1).reshape(x.shape)
    back = np.where(codes & 8, -NUMBERS[codes & 7], NUMBERS[codes & 7])
    back = back * np.repeat(want[1], gran, 1)[:, :columns]
    np.testing.assert_array_equal(from_fp4(values, scales, gran), back)


def test_ties_go_to_the_smaller_magnitude() -> None:
    ties = np.array([[6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0]], np.float32)
    back = from_fp4(*to_fp4(ties))
    assert back.tolist() == [[6.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 0.0, -4.0]]
    assert not np.signbit(np.asarray(back)[0, 8])
    above = to_fp4(np.nextafter(ties, np.float32(9)).clip(-6, 6))
    assert from_fp4(*above)[0, 1:8].tolist() == [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_scales_are_correctly_rounded() -> None:
    bits = np.random.default_rng(0).integers(0x00800000, 0x7F000000, 1 << 18, np.uint32)
    bits[:4] = 0x3F800000, 0x3FFFFFFF, 0x3FC00000, 0x3FBFFFFF
    amax = bits.view(np.float32)
    amax = amax[amax > 1e-30]
    np.testing.assert_array_equal(jax.jit(fp4._sixth)(amax), (amax.astype(np.float64) / 6).astype(np.float32))


def test_packed_scales() -> None:
    x = normal(1, 3, 320)
    values, words = to_fp4(x, True, 64, True)
    plain, scales = to_fp4(x, True, 64)
    np.testing.assert_array_equal(values, plain)
    unpacked = np.asarray(deep_gemm.unpack_ue8m0_from_int(words))
    np.testing.assert_array_equal(unpacked[:, :5], scales)
    np.testing.assert_array_equal(unpacked[:, 5:], np.ones((3, 3), np.float32))
    back = from_fp4(values, words, 64, True)
    np.testing.assert_array_equal(back, from_fp4(values, scales, 64))


def test_transpose() -> None:
    codes = np.random.default_rng(2).integers(0, 16, (4, 6), np.uint8)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    turned = codes.T[:, ::2] | codes.T[:, 1::2] << 4
    np.testing.assert_array_equal(deep_gemm.transpose_packed_fp4(packed), turned.view(np.int8))
    twice = deep_gemm.transpose_packed_fp4(deep_gemm.transpose_packed_fp4(packed))
    np.testing.assert_array_equal(twice, packed.view(np.int8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: deep_gemm.per_token_cast_to_fp4(x[:, :3]), ValueError, r"x is \[2, 3\].* n even"),
        (
            lambda x: deep_gemm.per_token_cast_to_fp4(x, use_packed_ue8m0=True),
            ValueError,
            "needs use_ue8m0=True",
        ),
        (lambda x: deep_gemm.per_token_cast_to_fp4(x[0]), ValueError, r"got \[4\], need a matrix"),
        (lambda x: deep_gemm.per_token_cast_to_fp4([1.0]), TypeError, "got list, need bfloat16"),
        (lambda x: deep_gemm.transpose_packed_fp4(x), TypeError, r"got float32, need bytes .*int8 or uint8"),
        (
            lambda x: deep_gemm.transpose_packed_fp4(np.zeros((3, 1), np.int8)),
            ValueError,
            "even number of rows",
        ),
        (lambda x: deep_gemm.cast_back_from_fp4(np.zeros((2, 2), np.int8), x), ValueError, r"need \[2, 1\]"),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(np.ones((2, 4), np.float32))
