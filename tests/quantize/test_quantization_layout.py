"""Scale layouts, packed UE8M0 and the cast helpers, against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jax_deepgemm.ops import quantize as qz
from tests.shared import quant_oracle

PACK = "get_mn_major_tma_aligned_packed_ue8m0_tensor"
K_GROUPED = qz.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor


def powers(shape, seed=0):
    rng = np.random.default_rng(seed)
    return np.ldexp(np.float32(1), rng.integers(-126, 128, shape)).astype(np.float32)


def codes(sf):
    """Biased exponents, one byte each."""
    return (np.asarray(sf).view(np.uint32) >> 23).astype(np.uint8)


def words(code_bytes):
    """int32 of four little-endian bytes of the last dimension."""
    return np.ascontiguousarray(code_bytes).view("<i4")


def aligned(n):
    return (n + 3) // 4 * 4


def test_aligned_size():
    assert [qz.get_tma_aligned_size(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]
    assert [qz.get_tma_aligned_size(17, size) for size in (1, 2, 4, 8)] == [32, 24, 20, 18]
    with pytest.raises(ValueError, match="3-byte elements"):
        qz.get_tma_aligned_size(4, 3)


@pytest.mark.parametrize("lead", [(), (1,), (2,), (2, 3)])
@pytest.mark.parametrize(("mn", "k"), [(4096, 1), (97, 56), (8, 57), (1, 1), (0, 3), (3, 0)])
def test_mn_major(lead, mn, k):
    sf = np.random.default_rng(0).random((*lead, mn, k), np.float32)
    got = np.asarray(qz.get_mn_major_tma_aligned_tensor(sf))
    assert got.shape == (*lead, k, aligned(mn))
    np.testing.assert_array_equal(got[..., :mn], np.swapaxes(sf, -1, -2))
    assert not got[..., mn:].any()


def test_ceil_to_ue8m0():
    x = np.array([1e-40, 2**-126, 0.3, 0.5, 1, 1.5, -3, 2**127, 3e38, 0, np.inf], np.float32)
    expected = [2**-125, 2**-126, 0.5, 0.5, 1, 2, 4, 2**127, 2**127, 2**-126, 2**127]
    expected[0] = 2**-126  # a subnormal: exponent 0 and a mantissa
    np.testing.assert_array_equal(qz.ceil_to_ue8m0(x), np.array(expected, np.float32))
    np.testing.assert_array_equal(qz.ceil_to_ue8m0(powers(1000)), powers(1000))


@settings(max_examples=8)
@example(shape=(0, 3), seed=0)
@example(shape=(3, 0), seed=0)
@example(shape=(1, 1), seed=0)
@given(shape=st.tuples(st.integers(0, 5), st.integers(0, 5)), seed=st.integers(0, 99))
def test_pack_and_unpack(shape, seed):
    sf = powers((shape[0], 4 * shape[1]), seed)
    packed = jax.jit(qz.pack_ue8m0_to_int)(sf)
    np.testing.assert_array_equal(np.asarray(packed), words(codes(sf)).reshape(shape))
    np.testing.assert_array_equal(jax.jit(qz.unpack_ue8m0_from_int)(packed), sf)


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize(("mn", "k"), [(128, 56), (97, 57), (1, 1), (5, 0)])
def test_packed_mn_major(lead, mn, k):
    sf = powers((*lead, mn, k))
    got = np.asarray(jax.jit(qz.get_mn_major_tma_aligned_packed_ue8m0_tensor)(sf))
    padded = np.zeros((*lead, aligned(mn), aligned(k)), np.uint8)
    padded[..., :mn, :k] = codes(sf)
    np.testing.assert_array_equal(got, np.swapaxes(words(padded), -1, -2))


def k_grouped_oracle(sf, ks, gran_k):
    parts, row = [], 0
    for k in ks:
        count = -(-k // gran_k)
        padded = np.zeros((aligned(sf.shape[1]), aligned(count)), np.uint8)
        padded[: sf.shape[1], :count] = codes(sf[row : row + count]).T
        parts.append(words(padded).T)
        row += count
    return np.concatenate(parts)


@pytest.mark.parametrize("gran_k", [32, 128])
@pytest.mark.parametrize("ks", [[128, 640, 0, 2048], [0, 0, 96], [1], [100, 513], [512] * 5])
def test_k_grouped(ks, gran_k):
    sf = powers((sum(-(-k // gran_k) for k in ks), 6))
    expected = k_grouped_oracle(sf, ks, gran_k)
    np.testing.assert_array_equal(jax.jit(lambda sf: K_GROUPED(sf, ks, gran_k))(sf), expected)
    on_device = jax.jit(K_GROUPED, static_argnums=2)(sf, jnp.array(ks, jnp.int32), gran_k)
    assert on_device.shape[0] == (sf.shape[0] + 3 * len(ks)) // 4 >= len(expected)
    np.testing.assert_array_equal(on_device[: len(expected)], expected)
    assert not np.asarray(on_device[len(expected) :]).any()


def test_k_grouped_without_groups():
    assert K_GROUPED(np.ones((0, 8), np.float32), []).shape == (0, 8)


@pytest.mark.parametrize("groups", [None, 1, 4])
@pytest.mark.parametrize(("mn", "k"), [(96, 128), (97, 7296)])
def test_required_layout(groups, mn, k):
    lead = () if groups is None else (groups,)
    rows, blocks = powers((*lead, mn, -(-k // 128))), powers((*lead, -(-mn // 128), -(-k // 128)))
    transform = qz.transform_sf_into_required_layout
    per_row = transform(rows, mn, k, (1, 128, 128), groups, is_sfa=True)
    np.testing.assert_array_equal(per_row, qz.get_mn_major_tma_aligned_tensor(rows))
    np.testing.assert_array_equal(transform(rows, mn, k, (1, 128), groups), per_row)
    np.testing.assert_array_equal(transform(blocks, mn, k, (1, 128, 128), groups, is_sfa=False), blocks)
    kept = transform(rows, mn, k, (1, 128), groups, disable_ue8m0_cast=True, arch="100a")
    np.testing.assert_array_equal(kept, per_row)
    packed = transform(rows, mn, k, (1, 128), groups, arch="100a")
    np.testing.assert_array_equal(packed, qz.get_mn_major_tma_aligned_packed_ue8m0_tensor(rows))
    np.testing.assert_array_equal(transform(packed, mn, k, (1, 128), groups, arch="100a"), packed)
    repeated = np.repeat(blocks, 128, -2)[..., :mn, :]
    expected = qz.get_mn_major_tma_aligned_packed_ue8m0_tensor(repeated)
    np.testing.assert_array_equal(transform(blocks, mn, k, (128, 128), groups, arch="100a"), expected)


ONES = np.ones((8, 2), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f(ONES, 8, 256, (1, 128, 128)), ValueError, r"recipe \(1, 128, 128\) with is_sfa=None"),
        (lambda f: f(ONES, 8, 256, (1, 128), is_sfa=True), ValueError, r"recipe \(1, 128\) with is_sfa=True"),
        (lambda f: f(ONES, 9, 256, (1, 128)), ValueError, r"scales are \[8, 2\]; mn=9.*need \[9, 2\]"),
        (lambda f: f(ONES, 8, 256, (1, 128), 4), ValueError, r"num_groups=4 need \[4, 8, 2\]"),
        (
            lambda f: f(ONES.astype(np.float16), 8, 256, (1, 128)),
            TypeError,
            r"float16, need float32, or int32",
        ),
        (lambda f: f(ONES, 8, 64, (1, 32)), ValueError, r"no kernel for arch 90a reads float32 .* 1 x 32"),
        (lambda f: f(np.ones((1, 8), np.int32), 8, 256, (1, 128)), ValueError, r"unpack_ue8m0_from_int"),
        (lambda f: f(ONES, 8, 128, (1, 64), arch="100a"), ValueError, r"no kernel for arch 100a"),
        (lambda f: f(ONES, 8, 256, (1, 128), arch="80"), ValueError, r"arch is '80'"),
    ],
)
def test_required_layout_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(qz.transform_sf_into_required_layout)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: qz.pack_ue8m0_to_int(np.ones(6, np.float32)), ValueError, r"\[6\] must be a multiple of 4"),
        (lambda: qz.pack_ue8m0_to_int(np.full(4, 0.3, np.float32)), ValueError, r"4 of 4 .* first is 0\.3"),
        (lambda: qz.pack_ue8m0_to_int(-np.ones(4, np.float32)), ValueError, r"ceil_to_ue8m0"),
        (lambda: qz.pack_ue8m0_to_int(np.ones(4)), TypeError, r"float64|float32"),
        (lambda: qz.unpack_ue8m0_from_int(ONES), TypeError, r"float32\[8,? ?2\], need int32"),
        (
            lambda: qz.get_mn_major_tma_aligned_tensor(ONES.astype(np.int32)),
            TypeError,
            r"int32, need float32",
        ),
        (lambda: qz.get_mn_major_tma_aligned_tensor(ONES[0]), ValueError, r"\[2\], need \[\.\., mn, K\]"),
        (lambda: getattr(qz, PACK)(ONES * 3), ValueError, r"16 of 16 scales are no power of two"),
        (lambda: K_GROUPED(ONES, [128]), ValueError, r"sf has 8 rows; ks \[128\] with gran_k 128 need 1"),
        (lambda: K_GROUPED(ONES[None], [128]), ValueError, r"sf is \[1, 8, 2\]"),
    ],
)
def test_errors(call, error, message):
    if "float64" in message:
        with jax.enable_x64(True), pytest.raises(error, match=message):
            call()
        return
    with pytest.raises(error, match=message):
        call()


# DeepGEMM's cast helpers ------------------------------------------------------------


@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize(
    ("cast", "gran_k", "block"),
    [
        (qz.per_token_cast_to_fp8, 128, (1, 128)),
        (qz.per_token_cast_to_fp8, 32, (1, 32)),
        (qz.per_channel_cast_to_fp8, 128, (128, 1)),
        (qz.per_block_cast_to_fp8, 128, (128, 128)),
    ],
)
def test_casts(cast, gran_k, block, use_ue8m0):
    x = np.random.default_rng(0).standard_normal((200, 300)).astype(jnp.bfloat16)
    values, scales = cast(x, use_ue8m0=use_ue8m0, gran_k=gran_k)
    expected = quant_oracle.quantize(x, block, scale_format="ue8m0" if use_ue8m0 else "f32")
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), expected[0].view(np.uint8))
    np.testing.assert_array_equal(scales, expected[1])


def test_packed_cast():
    x = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    values, packed = qz.per_token_cast_to_fp8(x, use_ue8m0=True, use_packed_ue8m0=True)
    plain_values, scales = qz.per_token_cast_to_fp8(x, use_ue8m0=True)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), np.asarray(plain_values).view(np.uint8))
    np.testing.assert_array_equal(qz.unpack_ue8m0_from_int(packed), scales)
    with pytest.raises(ValueError, match="needs use_ue8m0=True"):
        qz.per_token_cast_to_fp8(x, use_packed_ue8m0=True)
    with pytest.raises(ValueError, match="3 scales per row do not fill words of 4"):
        qz.per_token_cast_to_fp8(x[:, :384], use_ue8m0=True, use_packed_ue8m0=True)


@pytest.mark.parametrize("dims", [(0,), (1,), (-1,), (0, 2), (0, 1, 2)])
def test_custom_dims(dims):
    x = np.random.default_rng(0).standard_normal((6, 5, 64)).astype(np.float32)
    values, scales = qz.per_custom_dims_cast_to_fp8(x, dims)
    kept = {dim % 3 for dim in dims}
    rest = tuple(dim for dim in range(3) if dim not in kept)
    expected = np.maximum(np.abs(x).max(rest, keepdims=True), np.float32(1e-4)) / np.float32(448)
    np.testing.assert_array_equal(scales, expected.squeeze(rest))
    products = (x * (np.float32(1) / expected)).clip(-448, 448).astype(jnp.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), products.view(np.uint8))


def test_custom_dims_errors():
    for dims in ((), (0, 0), (3,)):
        with pytest.raises(ValueError, match="different dimensions"):
            qz.per_custom_dims_cast_to_fp8(np.ones((2, 3, 4), np.float32), dims)
