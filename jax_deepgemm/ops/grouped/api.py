"""Grouped GEMMs: one GEMM for each group of rows (the tokens of an expert, say), all in one kernel.

    m_grouped ..contiguous   D[rows of g] = A[rows of g] @ B[g]      groups of rows, one after the other
    m_grouped ..masked       D[g, :rows] = A[g, :rows] @ B[g]        equal storage for each group
    k_grouped ..contiguous   D[g] = A[rows of g].T @ B[rows of g]    the weight gradient of the first

Names and the letters of layouts are DeepGEMM's. Groups may have any number of rows, none too, and nothing
needs to be padded or aligned. How many rows a group has is known on the device only; numbers that make no
sense there never reach memory that is not the call's: a negative size counts as 0, and groups are cut at the
last row. To have them reported, see `jax_deepgemm.grouped.check_group_sizes`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.options import Sharding
from jax_deepgemm.ops.gemm.checks import Options, check_options, with_fine_blocks
from jax_deepgemm.ops.gemm.config import GemmConfig
from jax_deepgemm.ops.gemm.epilogue import Epilogue, no_epilogue
from jax_deepgemm.ops.gemm.op import empty_product
from jax_deepgemm.ops.grouped import checks, finished
from jax_deepgemm.ops.grouped import op as ops
from jax_deepgemm.ops.grouped.along_k import k_grouped_fp8, k_last
from jax_deepgemm.ops.quantize.array import QuantizedLike
from jax_deepgemm.ops.quantize.prepared_fp4 import PreparedFp4, products


def m_grouped_fp8_gemm_nt_contiguous(
    a: QuantizedLike,
    b: QuantizedLike | PreparedFp4,
    group_sizes: ArrayLike | None = None,
    *,
    m_indices: ArrayLike | None = None,
    ends: ArrayLike | None = None,
    alignment: int | None = None,
    group_offset: ArrayLike | None = None,
    expected_m: int | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """D = A @ B[g].T for the rows of each group g, with block-scaled FP8 operands.

    d[i, j] = sum_kb sa[i, kb] * sb[g, j // 128, kb] * sum_{l in kb} a[i, l] * b[g, j, l], with row i in g

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import m_grouped_fp8_gemm_nt_contiguous, quantize
    >>> x = jax.random.normal(jax.random.key(0), (8, 256), jnp.bfloat16)
    >>> w = jax.random.normal(jax.random.key(1), (3, 64, 256), jnp.bfloat16)
    >>> a, b = quantize(x, (1, 128)), quantize(w, (128, 128))
    >>> d = m_grouped_fp8_gemm_nt_contiguous(a, b, jnp.array([2, 0, 5]))
    >>> d.shape, d.dtype.name, bool((d[7:] == 0).all())
    ((8, 64), 'bfloat16', True)

    The same groups as an index per row, and as ends of groups that start at multiples of 4:

    >>> same = m_grouped_fp8_gemm_nt_contiguous(a, b, m_indices=jnp.array([0, 0, 2, 2, 2, 2, 2, -1]))
    >>> bool((same == d).all())
    True
    >>> m_grouped_fp8_gemm_nt_contiguous(a, b, ends=jnp.array([2, 4, 7]), alignment=4).shape
    (8, 64)

    Args:
      a: QuantizedArray of block (1, 128), or (values, scales): values [m, k] float8_e4m3fn or float8_e5m2,
        scales [m, ceil(k / 128)] float32; the number meant is stored * scale.
      b: values [g, n, k] float8_e4m3fn or float8_e5m2 (A and B may differ), and scales [g, ceil(n / 128),
        ceil(k / 128)] (block (128, 128)) or [g, n, ceil(k / 128)] (block (1, 128)). Of a bare tuple, the
        scales' shape tells which. Scales for 32 of k as in `fp8_gemm_nt`; an FP4 weight is a `PreparedFp4`.
      group_sizes: int32 [g], as in jax.lax.ragged_dot: rows of each group, one group after the other. Their
        sum may be less than m. int64 is converted.
      m_indices: int32 [m], instead: the group of each row, -1 (or any number that is no group) for none. Rows
        of a group stand together; groups may come in any order, with gaps.
      ends: int32 [g], instead: where each group ends. A group starts where the one before ended, rounded up
        to the alignment.
      alignment: rows, static, for `ends` only; None: `grouped.get_mk_alignment_for_contiguous_layout()`, 128.
      group_offset: int32 number, [] or [1]: b holds the groups from this one on, of those that group_sizes,
        ends (then longer than g) or m_indices describe. Rows of other groups are zero.
      expected_m: rows of a typical group, static; helps to choose the configuration, and changes no number.
      out_dtype: bfloat16 or float32; one rounding, to nearest even, after float32 accumulation.
      config: a GemmConfig to use instead of the cost model's choice.
      out_sharding: the result's sharding on a mesh with Explicit axes; needed there if k or g is cut.
      reduce_dtype: what partial results are summed in across devices that cut k or g: float32, or bfloat16
        for half the bytes and one more rounding per device.
      num_sms: at most so many SMs of the GPU, so that others stay free, for collectives say; None:
        `config.num_sms`.
      epilogue: an `Epilogue`: alpha, a bias [g, n] of each group, and an activation, applied to the float32
        sums; with its `out_scales` the result is a QuantizedArray. Not with FP4 weights.

    Returns:
      [m, n] in out_dtype. Every row is defined: those of no group (gaps, padding, the tail) are exactly zero,
      whatever a holds there, NaN too. m, n or k may be 0.

    Raises:
      ValueError: shapes, dtypes or scale blocks that do not fit; the message names both sides.
      TypeError: an operand that is not quantised; not exactly one of group_sizes, m_indices and ends.
      NotImplementedError: on differentiation; `grouped_linear` is the layer that has gradients.

    Deterministic: equal inputs give equal bits on one device kind. Under `jax.vmap` b is shared, not copied,
    if it is not mapped; a would be repeated. On CUDA, k is padded with zeros to rows of whole 16 bytes where
    needed, which copies the operand and logs a note. Source: DeepGEMM's function of this name, where groups
    are `m_indices` with aligned rows.
    """
    op = "m_grouped_fp8_gemm_nt_contiguous"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms, b=b)
    rows = checks.Rows(group_sizes, m_indices, ends, alignment, group_offset)
    return _m_grouped_fp8(op, "nt", a, b, rows, expected_m, epilogue, options)


def m_grouped_fp8_gemm_nn_contiguous(
    a: QuantizedLike,
    b: QuantizedLike,
    group_sizes: ArrayLike | None = None,
    *,
    m_indices: ArrayLike | None = None,
    ends: ArrayLike | None = None,
    alignment: int | None = None,
    group_offset: ArrayLike | None = None,
    expected_m: int | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """D = A @ B[g] for the rows of each group g, with block-scaled FP8 operands; B is stored [g, k, n].

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import m_grouped_fp8_gemm_nn_contiguous, quantize
    >>> dy = jax.random.normal(jax.random.key(0), (8, 64), jnp.bfloat16)
    >>> w = jax.random.normal(jax.random.key(1), (3, 64, 256), jnp.bfloat16)
    >>> a, b = quantize(dy, (1, 128)), quantize(w, (128, 128))
    >>> m_grouped_fp8_gemm_nn_contiguous(a, b, jnp.array([2, 0, 5])).shape
    (8, 256)

    The tensor cores read FP8 operands along k only, so B's bytes are transposed in front of the kernel at
    each call (a note is logged once per shape). For weights that are used often, store them [g, n, k] and
    call `m_grouped_fp8_gemm_nt_contiguous`.

    Args:
      a: values [m, k], scales [m, ceil(k / 128)]: block (1, 128).
      b: values [g, k, n], scales [g, ceil(k / 128), ceil(n / 128)] (block (128, 128)) or [g, ceil(k / 128),
        n] (block (128, 1)).
      group_sizes, m_indices, ends, alignment, group_offset, expected_m, out_dtype, config, out_sharding,
        reduce_dtype, num_sms, epilogue: as in `m_grouped_fp8_gemm_nt_contiguous`.

    Returns:
      [m, n] in out_dtype; rows of no group are exactly zero, whatever a holds there.

    Raises:
      ValueError, TypeError, NotImplementedError: as `m_grouped_fp8_gemm_nt_contiguous`.

    Deterministic; vmap and padding as `m_grouped_fp8_gemm_nt_contiguous`. Source: DeepGEMM's function of this
    name.
    """
    op = "m_grouped_fp8_gemm_nn_contiguous"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    rows = checks.Rows(group_sizes, m_indices, ends, alignment, group_offset)
    return _m_grouped_fp8(op, "nn", a, b, rows, expected_m, epilogue, options)


def m_grouped_bf16_gemm_nt_contiguous(
    a: ArrayLike,
    b: ArrayLike | PreparedFp4,
    group_sizes: ArrayLike | None = None,
    *,
    m_indices: ArrayLike | None = None,
    ends: ArrayLike | None = None,
    alignment: int | None = None,
    group_offset: ArrayLike | None = None,
    expected_m: int | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """D = A @ B[g].T for the rows of each group g, with bfloat16 operands and float32 accumulation.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import m_grouped_bf16_gemm_nt_contiguous
    >>> x = jnp.ones((5, 16), jnp.bfloat16)
    >>> w = jnp.stack([jnp.full((4, 16), g, jnp.bfloat16) for g in (1, 2, 3)])
    >>> m_grouped_bf16_gemm_nt_contiguous(x, w, jnp.array([2, 0, 2]), out_dtype=jnp.float32)[:, 0]
    Array([16., 16., 48., 48.,  0.], dtype=float32)

    Args:
      a: [m, k] bfloat16.
      b: [g, n, k] bfloat16, or an FP4 weight, a `PreparedFp4`, which has no gradient.
      group_sizes, m_indices, ends, alignment, group_offset, expected_m, out_dtype, config, out_sharding,
        reduce_dtype, num_sms, epilogue: as in `m_grouped_fp8_gemm_nt_contiguous`.

    Returns:
      [m, n] in out_dtype; rows of no group are exactly zero, whatever a holds there.

    Raises:
      ValueError: shapes or dtypes that do not fit; nothing is promoted.
      TypeError: an operand that is not an array; not exactly one of group_sizes, m_indices and ends.

    Differentiable with respect to a and b by jax.grad, jax.jvp, jax.linearize and their compositions; the
    derivatives are grouped GEMMs, so nothing is transposed and nothing exists once per group and row. Rows of
    no group have gradient zero and give none. The cotangent of a float32 result is rounded to bfloat16 before
    it is multiplied. Deterministic; vmap and padding as `m_grouped_fp8_gemm_nt_contiguous`. Source:
    DeepGEMM's function of this name.
    """
    op = "m_grouped_bf16_gemm_nt_contiguous"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms, b=b)
    rows = checks.Rows(group_sizes, m_indices, ends, alignment, group_offset)
    return _m_grouped_bf16(op, "nt", a, b, rows, expected_m, epilogue, options)


def m_grouped_bf16_gemm_nn_contiguous(
    a: ArrayLike,
    b: ArrayLike,
    group_sizes: ArrayLike | None = None,
    *,
    m_indices: ArrayLike | None = None,
    ends: ArrayLike | None = None,
    alignment: int | None = None,
    group_offset: ArrayLike | None = None,
    expected_m: int | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """D = A @ B[g] for the rows of each group g, with bfloat16 operands; B is stored [g, k, n].

    d[i, j] = sum_l a[i, l] * b[g, l, j], with row i in g. The kernel reads B as it is stored; nothing is
    transposed.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import m_grouped_bf16_gemm_nn_contiguous
    >>> x, w = jnp.ones((5, 16), jnp.bfloat16), jnp.ones((3, 16, 4), jnp.bfloat16)
    >>> m_grouped_bf16_gemm_nn_contiguous(x, w, jnp.array([2, 0, 2])).shape
    (5, 4)

    Args:
      a: [m, k] bfloat16.
      b: [g, k, n] bfloat16.
      group_sizes, m_indices, ends, alignment, group_offset, expected_m, out_dtype, config, out_sharding,
        reduce_dtype, num_sms, epilogue: as in `m_grouped_fp8_gemm_nt_contiguous`.

    Returns:
      [m, n] in out_dtype; rows of no group are exactly zero, whatever a holds there.

    Raises:
      ValueError, TypeError: as `m_grouped_bf16_gemm_nt_contiguous`.

    Differentiable and deterministic, as `m_grouped_bf16_gemm_nt_contiguous`. Source: DeepGEMM's function of
    this name.
    """
    op = "m_grouped_bf16_gemm_nn_contiguous"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    rows = checks.Rows(group_sizes, m_indices, ends, alignment, group_offset)
    return _m_grouped_bf16(op, "nn", a, b, rows, expected_m, epilogue, options)


def m_grouped_fp8_gemm_nt_masked(
    a: QuantizedLike,
    b: QuantizedLike | PreparedFp4,
    masked_m: ArrayLike,
    expected_m: int | None = None,
    *,
    zero_rows: bool = False,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """D[g, :masked_m[g]] = A[g, :masked_m[g]] @ B[g].T for each group g, with block-scaled FP8 operands.

    For decoding, where each group has storage for a fixed number of rows and few of them are used.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import m_grouped_fp8_gemm_nt_masked, quantize
    >>> x = jax.random.normal(jax.random.key(0), (3, 8, 256), jnp.bfloat16)
    >>> w = jax.random.normal(jax.random.key(1), (3, 64, 256), jnp.bfloat16)
    >>> a, b = quantize(x, (1, 128)), quantize(w, (128, 128))
    >>> m_grouped_fp8_gemm_nt_masked(a, b, jnp.array([2, 0, 8]), expected_m=4).shape
    (3, 8, 64)

    Args:
      a: values [g, m, k], scales [g, m, ceil(k / 128)]: block (1, 128). Any m.
      b: values [g, n, k], scales [g, ceil(n / 128), ceil(k / 128)] (block (128, 128)) or [g, n, ceil(k /
        128)] (block (1, 128)); or for 32 of k as in `fp8_gemm_nt`; or an FP4 weight, a `PreparedFp4`.
      masked_m: int32 [g], rows of each group that count; cut at 0 and at m.
      expected_m: rows of a typical group, static; helps to choose the configuration, and changes no number.
      zero_rows: True writes zeros to the other rows, static.
      out_dtype, config, out_sharding, reduce_dtype, num_sms, epilogue: as in
        `m_grouped_fp8_gemm_nt_contiguous`.

    Returns:
      [g, m, n] in out_dtype. Rows from masked_m[g] on are undefined unless zero_rows: writing them would cost
      more than the product. m, n or k may be 0.

    Raises:
      ValueError: shapes, dtypes or scale blocks that do not fit; the message names both sides.
      TypeError: an operand that is not quantised, an option of the wrong kind.
      NotImplementedError: on differentiation; `grouped_linear` is the layer that has gradients.

    Deterministic: equal inputs give equal bits on one device kind. What a holds in rows that do not count
    never reaches a row that does. Under `jax.vmap` b is shared, not copied, if it is not mapped. Source:
    DeepGEMM's function of this name.
    """
    op = "m_grouped_fp8_gemm_nt_masked"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms, b=b)
    hints = checks.check_hints(op, zero_rows, expected_m)
    if isinstance(b, PreparedFp4):
        no_epilogue(op, epilogue)
        return products().masked(op, a, b, masked_m, hints, options)
    left, right, (m, n, k) = checks.check_fp8(op, with_fine_blocks(checks.masked_sides("nt")), a, b)
    counts = checks.check_masked_m(op, masked_m, right.values.shape[0])
    if 0 in (m, n, k) and epilogue is None:
        return empty_product("gmk,gnk->gmn", left.values, right.values, options)
    arrays = (left.values, left.scales, right.values, right.scales, counts)
    base = ops.M_MASKED_FP8[right.block]
    return finished.gemm(op, base, arrays, epilogue, right.values.shape[0], n, options, **hints)


def m_grouped_bf16_gemm_nt_masked(
    a: ArrayLike,
    b: ArrayLike | PreparedFp4,
    masked_m: ArrayLike,
    expected_m: int | None = None,
    *,
    zero_rows: bool = False,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """D[g, :masked_m[g]] = A[g, :masked_m[g]] @ B[g].T for each group g, with bfloat16 operands.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import m_grouped_bf16_gemm_nt_masked
    >>> x, w = jnp.ones((2, 3, 16), jnp.bfloat16), jnp.ones((2, 4, 16), jnp.bfloat16)
    >>> m_grouped_bf16_gemm_nt_masked(x, w, jnp.array([1, 3]), zero_rows=True)[:, :, 0].tolist()
    [[16.0, 0.0, 0.0], [16.0, 16.0, 16.0]]

    Args:
      a: [g, m, k] bfloat16.
      b: [g, n, k] bfloat16, or an FP4 weight, a `PreparedFp4`, which has no gradient.
      masked_m, expected_m, zero_rows: as in `m_grouped_fp8_gemm_nt_masked`.
      out_dtype, config, out_sharding, reduce_dtype, num_sms, epilogue: as in
        `m_grouped_fp8_gemm_nt_contiguous`.

    Returns:
      [g, m, n] in out_dtype; rows from masked_m[g] on are undefined unless zero_rows.

    Raises:
      ValueError: shapes or dtypes that do not fit; nothing is promoted.
      TypeError: an operand that is not an array, an option of the wrong kind.

    Differentiable with respect to a and b as `m_grouped_bf16_gemm_nt_contiguous` is. Rows that do not count
    have gradient zero, and their cotangents are not read. Deterministic. Source: DeepGEMM's function of this
    name.
    """
    op = "m_grouped_bf16_gemm_nt_masked"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms, b=b)
    hints = checks.check_hints(op, zero_rows, expected_m)
    if isinstance(b, PreparedFp4):
        no_epilogue(op, epilogue)
        return products().masked(op, a, b, masked_m, hints, options)
    left, right, (m, n, k) = checks.check_bf16(op, checks.masked_sides("nt"), a, b)
    counts = checks.check_masked_m(op, masked_m, right.shape[0])
    if 0 in (m, n, k) and epilogue is None:
        return empty_product("gmk,gnk->gmn", left, right, options)
    run, arrays = ops.M_MASKED_BF16["nt"], (left, right, counts)
    return finished.gemm(op, run, arrays, epilogue, right.shape[0], n, options, **hints)


def k_grouped_fp8_gemm_nt_contiguous(
    a: QuantizedLike,
    b: QuantizedLike,
    group_sizes: ArrayLike,
    c: ArrayLike | None = None,
    *,
    num_groups: int | None = None,
    group_offset: ArrayLike | None = None,
    out_dtype: DTypeLike = jnp.float32,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
) -> jax.Array:
    """D[g] = C[g] + A[:, columns of g] @ B[:, columns of g].T for each group g of k, with FP8 operands.

    The weight gradient of a grouped GEMM: k runs over tokens, and each group has its own.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import k_grouped_fp8_gemm_nt_contiguous, quantize
    >>> dy_t = jax.random.normal(jax.random.key(0), (64, 300), jnp.bfloat16)
    >>> x_t = jax.random.normal(jax.random.key(1), (48, 300), jnp.bfloat16)
    >>> sizes = jnp.array([100, 0, 170])
    >>> k_grouped_fp8_gemm_nt_contiguous(quantize(dy_t, (1, 128)), quantize(x_t, (1, 128)), sizes).shape
    (3, 64, 48)

    Args:
      a: QuantizedArray of block (1, 128), or (values, scales): values [m, k] float8_e4m3fn or float8_e5m2,
        scales [m, ceil(k / 128)] float32. Blocks are those of the whole k, wherever groups end: a block may
        have columns of several groups.
      b: the same, [n, k].
      group_sizes: int32 [g]: columns of each group, one group after the other. Their sum may be less than k.
      c: optional [g, m, n] in out_dtype; its buffer becomes the result's if it is donated or not used again.
        In float32 it may be added by the memory system, for which subnormal numbers are zero.
      num_groups: groups of the result, static, with group_offset; None: all of group_sizes.
      group_offset: int32 number, [] or [1]: the first of the result's groups among those of group_sizes.
      out_dtype: float32 or bfloat16; one rounding, to nearest even, after C was added in float32.
      config: a GemmConfig to use instead of the cost model's choice.
      out_sharding: the result's sharding on a mesh with Explicit axes; needed there if k is cut.
      reduce_dtype: what partial results are summed in across devices that cut k: float32, or the result's
        bfloat16 for half the bytes and one more rounding per device.
      num_sms: at most so many SMs of the GPU; None: `config.num_sms`.

    Returns:
      [g, m, n] in out_dtype, all of it defined: an empty group gives C, or zeros. Columns of no group do not
      count, whatever is there, NaN too (but a NaN scale is that of its whole block).

    Raises:
      ValueError: shapes, dtypes or scale blocks that do not fit; the message names both sides.
      TypeError: an operand that is not quantised, an option of the wrong kind.
      NotImplementedError: on differentiation; `grouped_linear` is the layer that has gradients.

    Deterministic: equal inputs give equal bits on one device kind. The scales (1/32 of the values' bytes) are
    transposed in front of the kernel. Under `jax.vmap` operands are laid side by side along k, a copy.
    Source: DeepGEMM's function of this name, where groups are the sizes `ks`, on the host too.
    """
    op = "k_grouped_fp8_gemm_nt_contiguous"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    return k_grouped_fp8(op, "nt", a, b, c, (group_sizes, num_groups, group_offset), options)


def k_grouped_fp8_gemm_tn_contiguous(
    a: QuantizedLike,
    b: QuantizedLike,
    group_sizes: ArrayLike,
    c: ArrayLike | None = None,
    *,
    num_groups: int | None = None,
    group_offset: ArrayLike | None = None,
    out_dtype: DTypeLike = jnp.float32,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
) -> jax.Array:
    """D[g] = C[g] + A[rows of g].T @ B[rows of g] for each group g of k, with FP8 operands stored k first.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import k_grouped_fp8_gemm_tn_contiguous, quantize
    >>> dy = jax.random.normal(jax.random.key(0), (300, 64), jnp.bfloat16)
    >>> x = jax.random.normal(jax.random.key(1), (300, 48), jnp.bfloat16)
    >>> sizes = jnp.array([100, 0, 170])
    >>> k_grouped_fp8_gemm_tn_contiguous(quantize(dy, (128, 1)), quantize(x, (128, 1)), sizes).shape
    (3, 64, 48)

    The tensor cores read FP8 operands along k only, so the bytes of A and B are transposed in front of the
    kernel at each call (a note is logged once per shape). Where that pass matters, quantise the transposed
    matrices and call `k_grouped_fp8_gemm_nt_contiguous`.

    Args:
      a: values [k, m], scales [ceil(k / 128), m]: block (128, 1).
      b: values [k, n], scales [ceil(k / 128), n]: block (128, 1).
      group_sizes, c, num_groups, group_offset, out_dtype, config, out_sharding, reduce_dtype, num_sms: as in
        `k_grouped_fp8_gemm_nt_contiguous`.

    Returns:
      [g, m, n] in out_dtype, all of it defined: an empty group gives C, or zeros.

    Raises:
      ValueError, TypeError, NotImplementedError: as `k_grouped_fp8_gemm_nt_contiguous`.

    Deterministic; vmap as `k_grouped_fp8_gemm_nt_contiguous`. Source: DeepGEMM's function of this name.
    """
    op = "k_grouped_fp8_gemm_tn_contiguous"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    return k_grouped_fp8(op, "tn", a, b, c, (group_sizes, num_groups, group_offset), options)


def k_grouped_bf16_gemm_tn_contiguous(
    a: ArrayLike,
    b: ArrayLike,
    group_sizes: ArrayLike,
    c: ArrayLike | None = None,
    *,
    num_groups: int | None = None,
    group_offset: ArrayLike | None = None,
    out_dtype: DTypeLike = jnp.float32,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
) -> jax.Array:
    """D[g] = C[g] + A[rows of g].T @ B[rows of g] for each group g of k, with bfloat16 operands.

    The weight gradient of a grouped GEMM: k runs over tokens, and each group has its own.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import k_grouped_bf16_gemm_tn_contiguous
    >>> dy, x = jnp.ones((10, 4), jnp.bfloat16), jnp.ones((10, 8), jnp.bfloat16)
    >>> k_grouped_bf16_gemm_tn_contiguous(dy, x, jnp.array([3, 0, 5]))[:, 0, 0]
    Array([3., 0., 5.], dtype=float32)

    Args:
      a: [k, m] bfloat16.
      b: [k, n] bfloat16.
      group_sizes, c, num_groups, group_offset, out_dtype, config, out_sharding, reduce_dtype, num_sms: as in
        `k_grouped_fp8_gemm_nt_contiguous`.

    Returns:
      [g, m, n] in out_dtype, all of it defined: an empty group gives C, or zeros. Rows of no group do not
      count, whatever is there.

    Raises:
      ValueError: shapes or dtypes that do not fit; nothing is promoted.
      TypeError: an operand that is not an array, an option of the wrong kind.

    Differentiable with respect to a, b and c as `m_grouped_bf16_gemm_nt_contiguous` is. The kernel reads both
    operands as they are stored. Deterministic. Source: DeepGEMM's function of this name.
    """
    op = "k_grouped_bf16_gemm_tn_contiguous"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    left, right, (m, n, k) = checks.check_bf16(op, checks.k_grouped_sides("tn"), a, b)
    where, count = checks.check_k_groups(op, group_sizes, num_groups, group_offset)
    addend = checks.check_c(op, c, (count, m, n), options.out_dtype)
    if 0 in (m, n, k):
        return ops.empty_products("km,kn->mn", left, right, addend, count, options)
    run = ops.K_GROUPED_BF16 if addend is None else ops.K_GROUPED_BF16_ADD
    arrays = (left, right, where.group_sizes, where.group_offset, *(() if addend is None else (addend,)))
    return run(*arrays, rows_format=where.rows_format, num_groups=count, **vars(options))[0]


def _m_grouped_fp8(
    op: str, layout: str, a: Any, b: Any, rows: checks.Rows, expected_m: Any, epilogue: Any, options: Options
) -> Any:
    if layout == "nt" and isinstance(b, PreparedFp4):
        no_epilogue(op, epilogue)
        return products().contiguous(op, a, b, rows, expected_m, options)
    left, right, (m, n, k) = checks.check_fp8(op, with_fine_blocks(checks.m_grouped_sides(layout)), a, b)
    where = checks.check_rows(op, rows, m, right.values.shape[0])
    hint = checks.check_expected_m(op, expected_m)
    if 0 in (m, n, k) and epilogue is None:
        subscripts = "mk,gnk->mn" if layout == "nt" else "mk,gkn->mn"
        return empty_product(subscripts, left.values, right.values, options)
    values, scales = right.values, right.scales
    if layout == "nn":
        values = k_last(
            op, "b", right, f"Store b [g, n, k] and use {op.replace('nn', 'nt')} to avoid the pass."
        )
        scales = jnp.swapaxes(scales, -1, -2)
    arrays = (left.values, left.scales, values, scales, where.group_sizes, where.group_offset)
    base, groups = ops.M_GROUPED_FP8[right.block], right.values.shape[0]
    own: dict[str, Any] = {"rows_format": where.rows_format, "expected_m": hint}
    return finished.gemm(op, base, arrays, epilogue, groups, n, options, **own)


def _m_grouped_bf16(
    op: str, layout: str, a: Any, b: Any, rows: checks.Rows, expected_m: Any, epilogue: Any, options: Options
) -> Any:
    if layout == "nt" and isinstance(b, PreparedFp4):
        no_epilogue(op, epilogue)
        return products().contiguous(op, a, b, rows, expected_m, options)
    left, right, (m, n, k) = checks.check_bf16(op, checks.m_grouped_sides(layout), a, b)
    where = checks.check_rows(op, rows, m, right.shape[0])
    hint = checks.check_expected_m(op, expected_m)
    if 0 in (m, n, k) and epilogue is None:
        return empty_product("mk,gnk->mn" if layout == "nt" else "mk,gkn->mn", left, right, options)
    run = ops.M_GROUPED_BF16[layout]
    arrays = (left, right, where.group_sizes, where.group_offset)
    own: dict[str, Any] = {"rows_format": where.rows_format, "expected_m": hint}
    groups = right.shape[0]
    return finished.gemm(op, run, arrays, epilogue, groups, n, options, **own)
