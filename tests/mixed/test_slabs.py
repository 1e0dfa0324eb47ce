"""FP4 weights in slabs: every byte against the text, the way back, expanded numbers, what is refused."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm import Fp4Array, PreparedFp4, prepare_fp4, quantize
from jax_deepgemm.moe import prepare_weights
from jax_deepgemm.ops.quantize import slabs as layout
from jax_deepgemm.quantization import dequantize, dequantize_fp4, expand_fp4, quantize_fp4
from tests.shared import slab_bytes
from tests.shared.arrays import normal
from tests.shared.fp4_numbers import BYTES, meant, random, scales_of
from tests.shared.op_checks import make_mesh

pytestmark = pytest.mark.any_version

E2M1 = jnp.float4_e2m1fn
TOP = 133
"""A largest code of which 11 fewer are codes too."""


def drawn(seed: int, *shape: int, top: int = TOP, apart: int = 11) -> Fp4Array:
    """Any numbers, codes from top - apart to top; some groups of zeros with any code, one slab of zeros."""
    q = random(seed, *shape, lowest=top - apart, highest=top)
    rng = np.random.default_rng(seed + 1)
    values, codes = np.array(q.values), np.array(q.scales).view(np.uint8)
    zeros = rng.random(codes.shape) < 0.1
    zeros[..., -64:, -4:] = True
    values &= np.where(np.repeat(zeros, 16, axis=-1), 0x88, 0xFF).astype(np.uint8)
    codes = np.where(zeros, rng.integers(0, 255, codes.shape), codes).astype(np.uint8)
    return Fp4Array(jnp.asarray(values), scales_of(codes))


def base_of(slab: Any) -> float:
    return float(np.asarray(slab)[4352:4356].copy().view(np.float32)[0])


def parts(q: Fp4Array) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(q.values), np.asarray(q.scales).view(np.uint8)


@pytest.mark.parametrize("top", [11, 254])
def test_every_byte(top):
    q = drawn(top, 128, 288, top=top)
    got = prepare_fp4(q)
    np.testing.assert_array_equal(got.slabs, slab_bytes.slabs(*parts(q)))
    assert (got.shape, got.slabs.shape, got.dtype) == ((128, 384), (2, 3, layout.BYTES), E2M1)


def test_rows_as_staged_kernels_expand_them():
    """`Expander` in staged.cuh in NumPy: a thread of each row, and how many of eight lanes share banks."""
    [[slab]] = np.asarray(prepare_fp4(drawn(3, 64, 128)).slabs)
    words, exponents = slab[:4096].view(np.uint32).reshape(256, 4), slab[4096:4352].reshape(64, 4)
    row = np.arange(64)
    warp, half, g = row // 16, row // 8 % 2, row % 8
    slot = np.zeros(64 * 128, np.uint8)
    for q in range(4):
        unit = half * 128 + warp * 32 + g * 4 + (q ^ g // 2)
        assert all(len(set(unit[i : i + 8] % 8)) == 8 for i in range(0, 64, 8))
        for j in range(4):
            word, e = words[unit, j], exponents[(warp * 8 + g) * 2 + half, j].astype(np.int32)
            for upper in range(2):
                chunk = row * 128 + (2 * j + upper ^ row % 8) * 16 + 4 * q
                for i in range(4):
                    code, sign = word >> 16 * upper + 4 * i & 7, word >> 8 * i + (3 if upper else 7) & 1
                    number = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[code] * 2.0 ** (e - 6) * (1 - 2.0 * sign)
                    slot[chunk + i] = number.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    swizzled = slot.reshape(64, 8, 16)[row[:, None], np.arange(8) ^ row[:, None] % 8].reshape(64, 128)
    expanded = expand_fp4(prepare_fp4(drawn(3, 64, 128)))
    want = np.asarray(dequantize(expanded, jnp.float32))
    np.testing.assert_array_equal(
        swizzled.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * slab[4352:4356].view(np.float32), want
    )


def test_the_way_back():
    """Also of scales down to 2**-127, whose base is a subnormal number."""
    for top in (2, TOP):
        q = drawn(top, 2, 64, 224, top=top, apart=min(11, top))
        prepared = prepare_fp4(q)
        back = prepared.fp4(224)
        np.testing.assert_array_equal(back.values, q.values)
        np.testing.assert_array_equal(meant(back), meant(q))
        counts = np.any(parts(q)[0].reshape(2, 64, 7, 16) & 0x77, axis=-1)
        np.testing.assert_array_equal(parts(back)[1][counts], parts(q)[1][counts])
        assert not np.any(meant(prepared.fp4())[..., 224:])


def test_expanded():
    """Exact, by rows and by squares; of a prepared weight too."""
    q = drawn(0, 3, 192, 160)
    for block in ((1, 128), (128, 128)):
        for one in (expand_fp4(q, block), expand_fp4(prepare_fp4(q), block, k=160)):
            assert (one.block, one.shape) == (block, q.shape)
            numbers = np.asarray(one.values).astype(np.float64)
            scales = np.repeat(np.repeat(np.asarray(one.scales), block[0], 1)[:, :192], 128, 2)[..., :160]
            np.testing.assert_array_equal(numbers * scales, meant(q))
            np.testing.assert_array_equal(np.signbit(numbers), np.signbit(meant(q)))
    np.testing.assert_array_equal(dequantize(expand_fp4(q)), dequantize_fp4(q))


def test_expanded_far_apart():
    """Up to 2**14 exact, and then rounded to multiples of 2**-15 times the largest scale."""
    apart = np.arange(25)
    codes = np.stack([0 * apart + 140, 140 - apart], axis=-1).astype(np.uint8)
    q = Fp4Array(jnp.asarray(np.tile(BYTES, (25, 2))), scales_of(codes))
    got = np.asarray(dequantize(expand_fp4(q, (1, 128)))).astype(np.float64)
    unit = 2.0 ** (13 - 15)
    np.testing.assert_array_equal(got, np.round(meant(q) / unit) * unit)
    np.testing.assert_array_equal(got[:15], meant(q)[:15])


def test_as_checkpoints_have_it():
    q = drawn(3, 2, 64, 96)
    want = np.asarray(prepare_fp4(q).slabs)
    values, codes = parts(q)
    numbers = jax.lax.bitcast_convert_type(jnp.asarray(values), E2M1).reshape(2, 64, 96)
    for given in (
        tuple(q),
        (values.view(np.int8), codes.view(ml_dtypes.float8_e8m0fnu)),  # DeepSeek V4
        (values.reshape(2, 64, 3, 16), codes),  # gpt-oss
        Fp4Array(numbers, q.scales),
    ):
        np.testing.assert_array_equal(prepare_fp4(given).slabs, want)


def test_scales_too_far_apart():
    q = random(0, 3, 128, 256, lowest=127, highest=130)
    codes = parts(q)[1].copy()
    codes[2, 70, 5] = 130 + 12
    wide = Fp4Array(q.values, scales_of(codes))
    span = 142 - codes[2, 64:, 4:].min()
    with pytest.raises(ValueError, match="1 of 12 such blocks") as error:
        prepare_fp4(wide)
    assert f"expert 2, row block 1 (rows from 64), k block 1 (k from 128) are 2**{span} apart" in str(
        error.value
    )
    exact = dequantize(expand_fp4(wide, (1, 128)))  # the way out
    np.testing.assert_array_equal(exact, dequantize_fp4(wide))
    traced = jax.jit(prepare_fp4)(wide)
    base = np.apply_along_axis(base_of, -1, np.asarray(traced.slabs))
    want = np.zeros((3, 2, 2), bool)
    want[2, 1, 1] = True
    np.testing.assert_array_equal(np.isnan(base), want)
    back = np.isnan(meant(traced.fp4()))
    np.testing.assert_array_equal(back, np.kron(want, np.ones((64, 128), bool)))
    alone = Fp4Array(q.values.at[2, 70, 80:96].set(0x80), wide.scales)  # zeros, which do not count
    prepare_fp4(alone)


def test_nan_scales():
    """Of numbers, and of zeros."""
    q = random(0, 192, 128, lowest=124)
    nan = jax.lax.bitcast_convert_type(jnp.uint8(255), jnp.float8_e8m0fnu)
    scales = q.scales.at[5, 2].set(nan).at[130, 1].set(nan)
    prepared = prepare_fp4(Fp4Array(q.values.at[5].set(0), scales))
    assert [base_of(one) for one in prepared.slabs[:, 0]] == pytest.approx([np.nan, 2.0, np.nan], nan_ok=True)
    assert np.isnan(dequantize(expand_fp4(prepared, (1, 128)))[:64]).all()


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (TypeError, "w is float32 [64, 64], need an Fp4Array", lambda: prepare_fp4(jnp.ones((64, 64)))),
        (TypeError, "w is prepared already", lambda: prepare_fp4(prepare_fp4(drawn(0, 64, 64)))),
        (
            TypeError,
            "activations is bfloat16",
            lambda: prepare_fp4(drawn(0, 64, 64), activations=jnp.bfloat16),
        ),
        (TypeError, "scales of w are float32 [64, 2]", lambda: prepare_fp4((BYTES, jnp.ones((64, 2))))),
        (ValueError, "[60, 64]: n is 60, need a multiple of 64", lambda: prepare_fp4(random(0, 60, 64))),
        (
            ValueError,
            "scales float8_e8m0fnu [64, 3], need bytes",
            lambda: prepare_fp4((jnp.zeros((64, 32), jnp.uint8), scales_of(np.ones((64, 3), np.uint8)))),
        ),
        (ValueError, "k is 100 of a weight [64, 128]", lambda: prepare_fp4(drawn(0, 64, 96)).fp4(100)),
        (ValueError, "k is 0 of a weight [64, 128]", lambda: expand_fp4(prepare_fp4(drawn(0, 64, 96)), k=0)),
        (ValueError, "block is (1, 32)", lambda: expand_fp4(random(0, 64, 96), (1, 32))),
        (IndexError, "only the 1 leading dimensions", lambda: prepare_fp4(drawn(0, 2, 64, 96))[0, 0]),
        (IndexError, "only the 2 leading dimensions", lambda: random(0, 2, 64, 96)[..., 0]),
        (TypeError, "slabs of w are float32", lambda: PreparedFp4(jnp.ones((1, 1, 4368))).check()),
        (ValueError, "slabs of w are uint8 [4368]", lambda: PreparedFp4(jnp.ones(4368, jnp.uint8)).check()),
        (
            ValueError,
            "block is (1, 128) and dtype is float4",
            lambda: quantize(jnp.ones((2, 128)), dtype=E2M1),
        ),
        (ValueError, "d a multiple of 32", lambda: quantize(jnp.ones((2, 48)), (1, 32), E2M1)),
        (ValueError, "scale_format is 'e4m3'", lambda: quantize(jnp.ones((2, 64)), (1, 32), E2M1, "e4m3")),
    ],
)
def test_refused(error: Any, text: str, call: Any):
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_quantize():
    """As `quantize_fp4`, without a smallest amax."""
    x = normal(0, 3, 64, 96, dtype=jnp.float32)
    got, want = quantize(x, (1, 32), E2M1), quantize_fp4(x)
    assert isinstance(got, Fp4Array)
    assert got.shape == (3, 64, 96)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    small = quantize(x * 2.0**-60, (1, 32), "float4_e2m1fn", "ue8m0")
    np.testing.assert_array_equal(dequantize_fp4(small), dequantize_fp4(want) * 2.0**-60)
    none = quantize(x * 2.0**-60, (1, 32), E2M1, min_amax=1e-4)
    np.testing.assert_array_equal(dequantize_fp4(none), 0)


def test_leading_dimensions_and_transformations():
    q = drawn(0, 4, 128, 160)
    whole = prepare_fp4(q)
    np.testing.assert_array_equal(whole[1].slabs, prepare_fp4(q[1]).slabs)
    assert (q[1:3].shape, whole[1:3].shape) == ((2, 128, 160), (2, 128, 256))
    mapped = jax.jit(jax.vmap(prepare_fp4))(q)
    assert mapped.activations == whole.activations
    np.testing.assert_array_equal(mapped.slabs, whole.slabs)
    w13, w2 = prepare_weights((q[:, :64], q[:, 64:]), q)
    np.testing.assert_array_equal(w13.slabs, whole.slabs)
    np.testing.assert_array_equal(w2.slabs, whole.slabs)


@pytest.mark.parametrize("spec", [P("y", "x")])
def test_sharded(spec: P):
    """Experts and rows, by shard_map and by the shardings of arguments."""
    q = drawn(0, 4, 128, 160)
    mesh = make_mesh("auto")
    want = prepare_fp4(q)
    inside = jax.shard_map(prepare_fp4, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(jax.jit(inside)(q).slabs, want.slabs)
    placed = jax.device_put(q, NamedSharding(mesh, spec))
    shardings = want.shardings(NamedSharding(mesh, spec))
    program = jax.jit(prepare_fp4, out_shardings=shardings).lower(placed).compile()
    got = program(placed)
    np.testing.assert_array_equal(got.slabs, want.slabs)
    assert got.slabs.sharding.is_equivalent_to(shardings.slabs, 4)
    assert "all-gather" not in program.as_text()
