"""Layouts in which kernels read scales, and packed UE8M0.

JAX arrays have no strides. Where DeepGEMM returns a view [.., mn, K] with strides (.., 1, T(mn)), these
functions return the memory itself: an array [.., K, T(mn)], "MN-major", where T rounds up to 16 bytes, as TMA
asks of a row, and the padding is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_deepgemm.ops.quantize import reference

WORD = 4
"""UE8M0 codes per packed int32."""


def get_tma_aligned_size(size: int, element_size: int) -> int:
    """The smallest number of elements >= size that fills a multiple of 16 bytes, as TMA asks of a row.

    Args:
      size: elements, 0 or more.
      element_size: bytes of an element, 1, 2, 4, 8 or 16.

    Returns:
      Elements, a multiple of 16 / element_size.

    Raises:
      ValueError: another size or another number of bytes.

    Source: DeepGEMM's function of this name; the 16 bytes are TMA's (CUDA driver API, cuTensorMapEncodeTiled:
    global strides).

    >>> get_tma_aligned_size(4097, 4), get_tma_aligned_size(30, 1)
    (4100, 32)
    """
    if size < 0 or element_size not in (1, 2, 4, 8, 16):
        raise ValueError(
            f"get_tma_aligned_size: size {size} of {element_size}-byte elements; need a size >= 0 and 1, 2, "
            "4, 8 or 16 bytes."
        )
    step = 16 // element_size
    return -(-size // step) * step


def get_mn_major_tma_aligned_tensor(sf: ArrayLike) -> jax.Array:
    """Scales of one operand, MN-major, in rows of a multiple of 16 bytes.

    Args:
      sf: [.., mn, K] float32, a scale per row of the operand and block of k.

    Returns:
      [.., K, T(mn)] float32 with T(mn) = `get_tma_aligned_size(mn, 4)`; the padding is zero.

    Raises:
      TypeError: sf is not float32.
      ValueError: fewer than two dimensions.

    Source: DeepGEMM's function of this name, which returns a strided view of the same memory.

    >>> get_mn_major_tma_aligned_tensor(jnp.ones((5, 2))).tolist()
    [[1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]
    """
    sf = _matrix(sf, "get_mn_major_tma_aligned_tensor", np.float32)
    return _pad_last(jnp.swapaxes(sf, -1, -2), get_tma_aligned_size(sf.shape[-2], 4))


def ceil_to_ue8m0(x: ArrayLike) -> jax.Array:
    """The smallest power of two >= |x|, within 2**-126 .. 2**127; powers of two stay as they are.

    Args:
      x: float32, [..] of any shape.

    Returns:
      float32 of x's shape.

    Raises:
      TypeError: x is not float32.

    Source: DeepGEMM's function of this name; UE8M0 is the scale format E8M0 of the OCP Microscaling (MX)
    specification.

    >>> ceil_to_ue8m0(jnp.array([0.25, 0.3, 1.0, -5.0])).tolist()
    [0.25, 0.5, 1.0, 8.0]
    """
    return reference.ceil_to_power_of_two(_floats(x, "ceil_to_ue8m0"))


def pack_ue8m0_to_int(sf: ArrayLike) -> jax.Array:
    """Powers of two as UE8M0 codes, four in a word: byte j of word i is the exponent of number 4 i + j.

    A code is the exponent as float32 stores it, 127 + log2(number), so 1.0 has 0x7f. Zero has the code 0
    (padding).

    Args:
      sf: [.., 4 p] float32, powers of two or zeros. Under `jax.jit` the mantissa of other numbers is dropped.

    Returns:
      int32 [.., p].

    Raises:
      TypeError: sf is not float32.
      ValueError: a last dimension that 4 does not divide; numbers that are no power of two, where their
        values are known.

    Source: DeepGEMM's function of this name.

    >>> [hex(word) for word in pack_ue8m0_to_int(jnp.array([1.0, 2.0, 4.0, 0.5])).tolist()]
    ['0x7e81807f']
    """
    sf = _floats(sf, "pack_ue8m0_to_int")
    if sf.ndim < 1 or sf.shape[-1] % WORD:
        raise ValueError(
            f"pack_ue8m0_to_int: the last dimension of {list(sf.shape)} must be a multiple of {WORD}. Pad it "
            "with zeros, whose code is 0."
        )
    _check_powers_of_two(sf, "pack_ue8m0_to_int")
    return _pack(sf)


def unpack_ue8m0_from_int(packed: ArrayLike) -> jax.Array:
    """The powers of two that words of four UE8M0 codes stand for: the inverse of `pack_ue8m0_to_int`.

    Args:
      packed: int32 [.., p]; byte j of word i is the code of number 4 i + j.

    Returns:
      float32 [.., 4 p], 2 ** (code - 127); the code 0 gives zero.

    Raises:
      TypeError: packed is not int32, or has no dimension.

    Source: the packed form is DeepGEMM's (`pack_ue8m0_to_int`).

    >>> unpack_ue8m0_from_int(pack_ue8m0_to_int(jnp.array([1.0, 2.0, 4.0, 0.0]))).tolist()
    [1.0, 2.0, 4.0, 0.0]
    """
    packed = jnp.asarray(packed)
    if packed.dtype != np.int32 or packed.ndim < 1:
        raise TypeError(
            f"unpack_ue8m0_from_int: got {packed.dtype.name}{list(packed.shape)}, need int32 [.., words]."
        )
    words = lax.bitcast_convert_type(packed, jnp.uint32)[..., None]
    codes = (words >> _shifts(words.ndim)) & jnp.uint32(0xFF)
    return lax.bitcast_convert_type(codes << 23, jnp.float32).reshape(
        *packed.shape[:-1], WORD * packed.shape[-1]
    )


def get_mn_major_tma_aligned_packed_ue8m0_tensor(sf: ArrayLike) -> jax.Array:
    """Scales of one operand as packed UE8M0 words, MN-major, in rows of a multiple of 16 bytes.

    Args:
      sf: [.., mn, K] float32 powers of two, a scale per row of the operand and block of k.

    Returns:
      int32 [.., ceil(K / 4), T(mn)] with T(mn) = `get_tma_aligned_size(mn, 4)`; the padding is zero.

    Raises:
      TypeError: sf is not float32.
      ValueError: fewer than two dimensions; numbers that are no power of two, where their values are known.

    Source: DeepGEMM's function of this name, which returns a strided view of the same memory.

    >>> get_mn_major_tma_aligned_packed_ue8m0_tensor(jnp.ones((3, 5))).shape
    (2, 4)
    """
    where = "get_mn_major_tma_aligned_packed_ue8m0_tensor"
    sf = _matrix(sf, where, np.float32)
    _check_powers_of_two(sf, where)
    words = _pack(_pad_last(sf, -(-sf.shape[-1] // WORD) * WORD))
    return _pad_last(jnp.swapaxes(words, -1, -2), get_tma_aligned_size(sf.shape[-2], 4))


def get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
    sf: ArrayLike, ks: Sequence[int] | jax.Array, gran_k: int = 128
) -> jax.Array:
    """Packed UE8M0 scales of K-grouped operands: each group begins a new word.

    Args:
      sf: float32 powers of two [sum_g ceil(ks[g] / gran_k), mn]: the groups' scales, one under the other.
      ks: K of each group. A sequence of Python ints gives the exact number of words; an int32 array on the
        device gives the upper bound (rows of sf + 3 groups) // 4, zeros at the end.
      gran_k: elements of K per scale.

    Returns:
      int32 [sum_g ceil(ks[g] / (4 gran_k)), T(mn)], rows of a multiple of 16 bytes, zero codes as padding.

    Raises:
      TypeError: sf is not float32.
      ValueError: sf is no matrix or has another number of rows than ks say; numbers that are no power of two,
        where their values are known.

    Source: DeepGEMM's function of this name, which returns a strided view of the same memory.

    >>> get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(jnp.ones((6, 4)), [128, 640]).tolist()[0]
    [127, 127, 127, 127]
    >>> get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(jnp.ones((6, 4)), jnp.array([128, 640])).shape
    (3, 4)
    """
    where = "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor"
    sf = _matrix(sf, where, np.float32)
    if sf.ndim != 2 or gran_k < 1:
        raise ValueError(
            f"{where}: sf is {list(sf.shape)} and gran_k {gran_k}; need [rows, mn] and gran_k >= 1."
        )
    _check_powers_of_two(sf, where)
    if isinstance(ks, jax.Array):
        count, words = ks.shape[0], (sf.shape[0] + 3 * ks.shape[0]) // WORD
        rows = -(-ks.astype(jnp.int32) // gran_k)
    else:
        sizes = np.asarray([*ks], np.int64)
        if (sizes < 0).any() or (-(-sizes // gran_k)).sum() != sf.shape[0]:
            raise ValueError(
                f"{where}: sf has {sf.shape[0]} rows; ks {list(ks)} with gran_k {gran_k} need "
                f"{int((-(-sizes // gran_k)).sum())}: ceil(k / gran_k) per group."
            )
        count, words = len(sizes), int((-(-sizes // (WORD * gran_k))).sum())
        rows = jnp.asarray(-(-sizes // gran_k), jnp.int32)
    width = get_tma_aligned_size(sf.shape[1], 4)
    if not count or not words or not sf.shape[0]:
        return jnp.zeros((words, width), jnp.int32)
    source, valid = _k_grouped_rows(rows, words)
    codes = jnp.where(valid[..., None], sf[jnp.where(valid, source, 0)], 0)
    return _pad_last(_pack(jnp.moveaxis(codes, 1, -1))[..., 0], width)


def _k_grouped_rows(rows: jax.Array, words: int) -> tuple[jax.Array, jax.Array]:
    """For each byte of each word [words, 4]: the row of sf it comes from, and whether there is one."""
    row_end, word_end = jnp.cumsum(rows), jnp.cumsum(-(-rows // WORD))
    word = jnp.arange(words, dtype=jnp.int32)
    group = jnp.cumsum(jnp.zeros(words + 1, jnp.int32).at[word_end].add(1)[:words], dtype=jnp.int32)
    group = jnp.minimum(group, rows.shape[0] - 1)
    first_word = (word_end - (-(-rows // WORD)))[group]
    in_group = WORD * (word - first_word)[:, None] + jnp.arange(WORD, dtype=jnp.int32)[None]
    source = (row_end - rows)[group][:, None] + in_group
    return source, (in_group < rows[group][:, None]) & (word < word_end[-1])[:, None]


def transform_sf_into_required_layout(
    sf: ArrayLike,
    mn: int,
    k: int,
    recipe: Sequence[int],
    num_groups: int | None = None,
    is_sfa: bool | None = None,
    disable_ue8m0_cast: bool = False,
    *,
    arch: str = "90a",
) -> jax.Array:
    """Scales in the layout that the kernels of an architecture read.

    | scales                              | arch            | result                         |
    |-------------------------------------|-----------------|--------------------------------|
    | float32, 1 x 128                    | 90a, or (*)     | float32 [g?, K, T(mn)]         |
    | float32, 128 x 128                  | 90a, or (*)     | as given                       |
    | float32 powers of two, any x 32/128 | 100a            | int32 [g?, ceil(K / 4), T(mn)] |
    | int32 MN-major, 1 x 32/128          | 100a            | as given                       |

    (*) disable_ue8m0_cast on any architecture. K = ceil(k / gran_k).

    Args:
      sf: scales [g?, ceil(mn / gran_mn), ceil(k / gran_k)] float32; packed: int32 [g?, ceil(k / (4 gran_k)),
        T(mn)], MN-major.
      mn, k: extents of the operand.
      recipe: (gran_m, gran_n, gran_k), and `is_sfa` says which of the first two; or (gran_mn, gran_k).
      num_groups: leading dimension of sf, None if it has none.
      is_sfa: whether these are the scales of A; None with a recipe of two.
      disable_ue8m0_cast: keep float32 on every architecture.
      arch: "90a" or "100a".

    Returns:
      Scales as the table says.

    Raises:
      TypeError: scales that are neither float32 nor int32.
      ValueError: shapes that do not fit, an unknown arch, a recipe that is_sfa does not fit, a form that no
        kernel reads.

    Source: DeepGEMM's function of this name; there the result is a strided view.

    >>> transform_sf_into_required_layout(jnp.ones((5, 2)), 5, 256, (1, 128, 128), is_sfa=True).shape
    (2, 8)
    """
    where = "transform_sf_into_required_layout"
    gran_mn, gran_k = _granularity(recipe, is_sfa, where)
    if arch not in ("90a", "100a"):
        raise ValueError(f"{where}: arch is {arch!r}, need '90a' (float32 scales) or '100a' (packed UE8M0).")
    sf = jnp.asarray(sf)
    packed = sf.dtype == np.int32
    lead = () if num_groups is None else (num_groups,)
    grid = (-(-mn // gran_mn), -(-k // gran_k))
    if packed:
        grid = (-(-k // (WORD * gran_k)), get_tma_aligned_size(mn, 4))
    if sf.dtype not in (np.float32, np.int32):
        raise TypeError(f"{where}: scales are {sf.dtype.name}, need float32, or int32 for packed UE8M0.")
    if sf.shape != lead + grid:
        raise ValueError(
            f"{where}: scales are {list(sf.shape)}; mn={mn}, k={k}, blocks of {gran_mn} x {gran_k} and "
            f"num_groups={num_groups} need {list(lead + grid)}."
        )
    if not packed and (arch == "90a" or disable_ue8m0_cast):
        if (gran_mn, gran_k) == (1, 128):
            return get_mn_major_tma_aligned_tensor(sf)
        if (gran_mn, gran_k) == (128, 128):
            return sf
    elif arch == "100a" and gran_k in (32, 128):
        if packed and gran_mn == 1:
            return sf
        if not packed:
            rows = jnp.repeat(sf, gran_mn, axis=-2)[..., :mn, :]
            return get_mn_major_tma_aligned_packed_ue8m0_tensor(rows)
    raise ValueError(
        f"{where}: no kernel for arch {arch} reads {sf.dtype.name} scales of {gran_mn} x {gran_k} "
        f"blocks{' with disable_ue8m0_cast' if disable_ue8m0_cast else ''}. 90a reads float32 scales of 1 x "
        "128 and 128 x 128 (packed ones become float32 with unpack_ue8m0_from_int); 100a reads packed UE8M0 "
        "of 32 or 128 along k."
    )


def _granularity(recipe: Sequence[int], is_sfa: bool | None, where: str) -> tuple[int, int]:
    if len(recipe) == 3 and is_sfa is not None:
        return (recipe[0] if is_sfa else recipe[1]), recipe[2]
    if len(recipe) == 2 and is_sfa is None:
        return recipe[0], recipe[1]
    raise ValueError(
        f"{where}: recipe {tuple(recipe)} with is_sfa={is_sfa}; need (gran_m, gran_n, gran_k) and is_sfa "
        "True or False, or (gran_mn, gran_k) without is_sfa."
    )


def _pack(sf: jax.Array) -> jax.Array:
    codes = (lax.bitcast_convert_type(sf, jnp.uint32) >> 23) & jnp.uint32(0xFF)
    bytes_ = codes.reshape(*sf.shape[:-1], sf.shape[-1] // WORD, WORD)
    words = jnp.sum(bytes_ << _shifts(bytes_.ndim), axis=-1, dtype=jnp.uint32)
    return lax.bitcast_convert_type(words, jnp.int32)


def _shifts(rank: int) -> jax.Array:
    """By how many bits each byte of a word is shifted, along the last of `rank` dimensions."""
    return 8 * jnp.arange(WORD, dtype=jnp.uint32).reshape((1,) * (rank - 1) + (WORD,))


def _pad_last(x: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def _floats(x: Any, where: str) -> jax.Array:
    x = jnp.asarray(x)
    if x.dtype != np.float32:
        raise TypeError(f"{where}: got {x.dtype.name}, need float32.")
    return x


def _matrix(sf: Any, where: str, dtype: Any) -> jax.Array:
    sf = jnp.asarray(sf)
    if sf.dtype != dtype:
        raise TypeError(f"{where}: scales are {sf.dtype.name}, need {np.dtype(dtype).name}.")
    if sf.ndim < 2:
        raise ValueError(f"{where}: scales are {list(sf.shape)}, need [.., mn, K].")
    return sf


def _check_powers_of_two(sf: jax.Array, where: str) -> None:
    """Where the values are known, refuses those that UE8M0 cannot hold."""
    if isinstance(sf, jax.core.Tracer) or not sf.is_fully_addressable:
        return
    bits = np.asarray(sf).view(np.uint32)
    bad = (bits & 0x807FFFFF != 0) | (bits >> 23 == 255)
    if bad.any():
        raise ValueError(
            f"{where}: {int(bad.sum())} of {bad.size} scales are no power of two, the first is "
            f"{np.asarray(sf)[bad].flat[0]}. Quantise with scale_format='ue8m0', or round up with "
            "ceil_to_ue8m0."
        )
