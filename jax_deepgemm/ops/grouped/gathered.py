"""Grouped GEMMs whose rows are named by an index: the kernel reads each row from where it is, so that no copy
of the rows, one for each use, is made in front of it. In a mixture of experts that copy is the dispatch.

    m_grouped ..gathered   D[i] = A[rows[i]] @ B[g], with row i in group g
    k_grouped ..gathered   D[g] = sum over i in group g of A[a_rows[i]] and B[i], or A[i] and B[b_rows[i]]

The numbers are those of `jnp.take` (zeros for no row) and the product behind it, and so is the time, or more
along k (docs/performance.md): what is saved is the memory of the copy. An index is never trusted: a number
that is no row of its operand is a row of zeros. FP8 along k has no kernel that reads by an index, as its
operands have k last, where an index names single bytes: `k_grouped_fp8_gemm_tn_gathered` takes rows that are
not quantised yet, and gathers, quantises and transposes them in one pass (`quantize_groups`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.options import Sharding
from jax_deepgemm.core.prefix import prefix_ends
from jax_deepgemm.ops.gemm.checks import BLOCKED, Options, check_options, describe
from jax_deepgemm.ops.gemm.config import GemmConfig
from jax_deepgemm.ops.gemm.op import empty_product
from jax_deepgemm.ops.grouped import checks
from jax_deepgemm.ops.grouped import gathered_op as ops
from jax_deepgemm.ops.grouped.op import K_GROUPED_FP8, K_GROUPED_FP8_ADD, empty_products
from jax_deepgemm.ops.quantize.array import QuantizedLike
from jax_deepgemm.ops.quantize.blocks import row_blocks
from jax_deepgemm.ops.quantize.groups import quantize_groups
from jax_deepgemm.ops.rows.reference import take


def m_grouped_fp8_gemm_nt_gathered(
    a: QuantizedLike,
    b: QuantizedLike,
    rows: ArrayLike,
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
) -> jax.Array:
    """D[i] = A[rows[i]] @ B[g].T for the rows i of each group g, with block-scaled FP8 operands.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import m_grouped_fp8_gemm_nt_gathered, quantize
    >>> x = jax.random.normal(jax.random.key(0), (4, 256), jnp.bfloat16)
    >>> w = jax.random.normal(jax.random.key(1), (3, 64, 256), jnp.bfloat16)
    >>> a, b, rows = quantize(x, (1, 128)), quantize(w, (128, 128)), jnp.array([0, 3, 3, 1, -1])
    >>> d = m_grouped_fp8_gemm_nt_gathered(a, b, rows, jnp.array([2, 0, 3]))
    >>> d.shape, bool((d[4] == 0).all())
    ((5, 64), True)

    Args:
      a: QuantizedArray of block (1, 128), or (values, scales): values [t, k] float8_e4m3fn or float8_e5m2,
        scales [t, ceil(k / 128)] float32. Scales are read by the index as the values are.
      b: values [g, n, k] and scales, as in `m_grouped_fp8_gemm_nt_contiguous`.
      rows: integers [m]: which row of a each row of the product is, as often as it is named; -1, or any
        other number that is no row of a, for a row of zeros.
      group_sizes, m_indices, ends, alignment, group_offset, expected_m, out_dtype, config, out_sharding,
        reduce_dtype, num_sms: as in `m_grouped_fp8_gemm_nt_contiguous`, of the m rows of the product.

    Returns:
      [m, n] in out_dtype. Every row is defined: those of no group are exactly zero. m, n, k or t may be 0.

    Raises:
      ValueError: shapes, dtypes or scale blocks that do not fit; the message names both sides.
      TypeError: an operand that is not quantised; not exactly one of group_sizes, m_indices and ends.
      NotImplementedError: on differentiation; `grouped_linear` is the layer that has gradients.

    Bit-equal to `m_grouped_fp8_gemm_nt_contiguous` of the rows, taken first, with the same config.
    Deterministic. On a mesh a's rows are whole on each device, and `rows` is cut where the product's rows
    are. Under `jax.vmap` operands that are not mapped are shared, not copied. Source: DeepGEMM's
    `legacy.a_fused_m_grouped_bf16_gemm_nt_contiguous_tl`, in FP8.
    """
    op = "m_grouped_fp8_gemm_nt_gathered"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    left, right, (t, n, k) = checks.check_fp8(op, checks.m_grouped_sides("nt"), a, b)
    index = _check_index(op, "rows", rows, "a row of a for each row of the product, -1 for none")
    groups = checks.Rows(group_sizes, m_indices, ends, alignment, group_offset)
    where = checks.check_rows(op, groups, index.shape[0], right.values.shape[0])
    hint = checks.check_expected_m(op, expected_m)
    if 0 in (index.shape[0], n, k, t):
        return _nothing("mk,gnk->mn", left.values, right.values, index, options)
    run = ops.M_GATHERED_FP8_BLOCK if right.block == BLOCKED else ops.M_GATHERED_FP8_ROW
    arrays = (left.values, left.scales, right.values, right.scales, index)
    described = {"rows_format": where.rows_format, "expected_m": hint}
    return run(*arrays, where.group_sizes, where.group_offset, **described, **vars(options))[0]


def m_grouped_bf16_gemm_nt_gathered(
    a: ArrayLike,
    b: ArrayLike,
    rows: ArrayLike,
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
) -> jax.Array:
    """D[i] = A[rows[i]] @ B[g].T for the rows i of each group g, with bfloat16 operands.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import m_grouped_bf16_gemm_nt_gathered
    >>> x = jnp.array([[1.0] * 16, [2.0] * 16], jnp.bfloat16)
    >>> w = jnp.ones((2, 8, 16), jnp.bfloat16)
    >>> m_grouped_bf16_gemm_nt_gathered(x, w, jnp.array([1, 0, 1, -1]), jnp.array([2, 2]))[:, 0].tolist()
    [32.0, 16.0, 32.0, 0.0]

    Args:
      a: [t, k] bfloat16.
      b: [g, n, k] bfloat16.
      rows: integers [m], as in `m_grouped_fp8_gemm_nt_gathered`.
      group_sizes, m_indices, ends, alignment, group_offset, expected_m, out_dtype, config, out_sharding,
        reduce_dtype, num_sms: as in `m_grouped_fp8_gemm_nt_contiguous`, of the m rows of the product.

    Returns:
      [m, n] in out_dtype; rows of no group are exactly zero.

    Raises:
      ValueError: shapes or dtypes that do not fit; nothing is promoted.
      TypeError: an operand that is not an array; not exactly one of group_sizes, m_indices and ends.

    Differentiable with respect to a and b, as `m_grouped_bf16_gemm_nt_contiguous` is: the gradient of a row
    of a is the sum of those of the rows it was used for, that of b copies the rows. Deterministic
    but for the order of that sum; bits, mesh and vmap as `m_grouped_fp8_gemm_nt_gathered`. Source: DeepGEMM's
    `legacy.a_fused_m_grouped_bf16_gemm_nt_contiguous_tl`.
    """
    op = "m_grouped_bf16_gemm_nt_gathered"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    groups = checks.Rows(group_sizes, m_indices, ends, alignment, group_offset)
    return _m_bf16(op, "nt", a, b, rows, groups, expected_m, options)


def m_grouped_bf16_gemm_nn_gathered(
    a: ArrayLike,
    b: ArrayLike,
    rows: ArrayLike,
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
) -> jax.Array:
    """D[i] = A[rows[i]] @ B[g] for the rows i of each group g, with bfloat16 operands; B is stored [g, k, n].

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import m_grouped_bf16_gemm_nn_gathered
    >>> x, w = jnp.ones((2, 16), jnp.bfloat16), jnp.ones((3, 16, 4), jnp.bfloat16)
    >>> m_grouped_bf16_gemm_nn_gathered(x, w, jnp.array([0, 1, 1, 0, 1]), jnp.array([2, 0, 3])).shape
    (5, 4)

    Args:
      a: [t, k] bfloat16.
      b: [g, k, n] bfloat16.
      rows, group_sizes, m_indices, ends, alignment, group_offset, expected_m, out_dtype, config,
        out_sharding, reduce_dtype, num_sms: as in `m_grouped_bf16_gemm_nt_gathered`.

    Returns:
      [m, n] in out_dtype; rows of no group are exactly zero.

    Raises:
      ValueError, TypeError: as `m_grouped_bf16_gemm_nt_gathered`.

    Differentiable and deterministic, as `m_grouped_bf16_gemm_nt_gathered`. Source: DeepGEMM's
    `legacy.a_fused_m_grouped_bf16_gemm_nn_contiguous_tl`.
    """
    op = "m_grouped_bf16_gemm_nn_gathered"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    groups = checks.Rows(group_sizes, m_indices, ends, alignment, group_offset)
    return _m_bf16(op, "nn", a, b, rows, groups, expected_m, options)


def k_grouped_bf16_gemm_tn_gathered(
    a: ArrayLike,
    b: ArrayLike,
    group_sizes: ArrayLike,
    c: ArrayLike | None = None,
    *,
    a_rows: ArrayLike | None = None,
    b_rows: ArrayLike | None = None,
    num_groups: int | None = None,
    group_offset: ArrayLike | None = None,
    out_dtype: DTypeLike = jnp.float32,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
) -> jax.Array:
    """D[g] = C[g] + A[a_rows of g].T @ B[rows of g] for each group g, or B's rows by b_rows, in bfloat16.

    The weight gradient of `m_grouped_bf16_gemm_nt_gathered`.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import k_grouped_bf16_gemm_tn_gathered
    >>> x, dy = jnp.ones((2, 4), jnp.bfloat16), jnp.ones((5, 8), jnp.bfloat16)
    >>> rows, sizes = jnp.array([0, 1, -1, 1, 1]), jnp.array([3, 2])
    >>> k_grouped_bf16_gemm_tn_gathered(x, dy, sizes, a_rows=rows)[:, 0, 0].tolist()
    [2.0, 2.0]

    Args:
      a: [k, m] bfloat16; with a_rows [t, m].
      b: [k, n] bfloat16; with b_rows [t, n].
      group_sizes: as in `k_grouped_bf16_gemm_tn_contiguous`, of k.
      c: optional [g, m, n] in out_dtype, added.
      a_rows, b_rows: exactly one of them, integers [k]: which row of that operand stands at each place of k;
        -1, or any other number that is no row of it, for a row of zeros.
      num_groups, group_offset, out_dtype, config, out_sharding, reduce_dtype, num_sms: as in
        `k_grouped_fp8_gemm_nt_contiguous`.

    Returns:
      [g, m, n] in out_dtype, all of it defined: an empty group gives C, or zeros.

    Raises:
      ValueError: shapes or dtypes that do not fit; nothing is promoted.
      TypeError: an operand that is not an array; not exactly one of a_rows and b_rows.

    Differentiable with respect to a, b and c. Bit-equal to `k_grouped_bf16_gemm_tn_contiguous` of the rows,
    taken first, with the same config. Mesh and vmap as `m_grouped_fp8_gemm_nt_gathered`. Source: DeepGEMM's
    `legacy.a_fused_k_grouped_bf16_gemm_tn_contiguous_tl` and `b_fused_...`.
    """
    op = "k_grouped_bf16_gemm_tn_gathered"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    left, right = checks.bf16_pair(op, checks.k_grouped_sides("tn"), a, b)
    side, index = _check_named(op, left, right, a_rows, b_rows)
    other = right if side == "a" else left
    k, m, n = index.shape[0], left.shape[1], right.shape[1]
    where, count = checks.check_k_groups(op, group_sizes, num_groups, group_offset)
    addend = checks.check_c(op, c, (count, m, n), options.out_dtype)
    if 0 in (m, n, k, left.shape[0], right.shape[0]):
        left, right = (take(x, index)[0] if x is not other else x for x in (left, right))
        return empty_products("km,kn->mn", left, right, addend, count, options)
    added = () if addend is None else (addend,)
    run = (ops.K_GATHERED_BF16_ADD if added else ops.K_GATHERED_BF16)[side]
    arrays = (left, right, index, where.group_sizes, where.group_offset)
    return run(*arrays, *added, rows_format=where.rows_format, num_groups=count, **vars(options))[0]


def k_grouped_fp8_gemm_tn_gathered(
    a: ArrayLike,
    b: ArrayLike,
    group_sizes: ArrayLike,
    c: ArrayLike | None = None,
    *,
    a_rows: ArrayLike | None = None,
    b_rows: ArrayLike | None = None,
    num_groups: int | None = None,
    group_offset: ArrayLike | None = None,
    scale_format: str = "f32",
    out_dtype: DTypeLike = jnp.float32,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
) -> jax.Array:
    """D[g] = C[g] + A[a_rows of g].T @ B[rows of g] for each group g, or B's rows by b_rows, in FP8.

    The weight gradient of `m_grouped_fp8_gemm_nt_gathered`, of operands that are not quantised yet: each is
    gathered, quantised and transposed in one pass.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import k_grouped_fp8_gemm_tn_gathered
    >>> x, dy = jnp.ones((2, 4), jnp.bfloat16), jnp.ones((5, 8), jnp.bfloat16)
    >>> rows, sizes = jnp.array([0, 1, -1, 1, 1]), jnp.array([3, 2])
    >>> k_grouped_fp8_gemm_tn_gathered(x, dy, sizes, a_rows=rows)[:, 0, 0].tolist()
    [2.0, 2.0]

    Args:
      a: [k, m] bfloat16; with a_rows [t, m].
      b: [k, n] bfloat16; with b_rows [t, n].
      group_sizes: int32 [g]: rows of each group, one group after the other. Their sum may be less than k.
      c, a_rows, b_rows, num_groups, group_offset: as in `k_grouped_bf16_gemm_tn_gathered`.
      scale_format: "f32", or "ue8m0" for scales that are powers of two.
      out_dtype, config, out_sharding, reduce_dtype, num_sms: as in `k_grouped_fp8_gemm_nt_contiguous`.

    Returns:
      [g, m, n] in out_dtype, all of it defined: an empty group gives C, or zeros. Rows of no group do not
      count, whatever is there, NaN too.

    Raises:
      ValueError: shapes, dtypes or formats that do not fit.
      TypeError: an operand that is not an array; not exactly one of a_rows and b_rows.
      NotImplementedError: on differentiation; `grouped_linear` is the layer that has gradients.

    One scale per feature and 128 rows, in blocks that begin with each group (`quantization.row_blocks`): no
    group's scales depend on another's rows. FP8 copies of both operands, straight and transposed, are made in
    front of the product. Deterministic. On a mesh rows and features are whole on each device. Source: the
    DeepSeek-V3 report, section 3.3, on weight gradients.
    """
    op = "k_grouped_fp8_gemm_tn_gathered"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    left, right = checks.bf16_pair(op, checks.k_grouped_sides("tn"), a, b)
    side, index = _check_named(op, left, right, a_rows, b_rows)
    k, m, n = index.shape[0], left.shape[1], right.shape[1]
    where, count = checks.check_k_groups(op, group_sizes, num_groups, group_offset)
    addend = checks.check_c(op, c, (count, m, n), options.out_dtype)
    named = (index, None) if side == "a" else (None, index)
    if 0 in (m, n, k, left.shape[0], right.shape[0]):
        left, right = (x if i is None else take(x, i)[0] for x, i in zip((left, right), named, strict=True))
        return empty_products("km,kn->mn", left, right, addend, count, options)
    blocks = row_blocks(where.group_sizes, k)
    quantised = [
        part
        for x, i in zip((left, right), named, strict=True)
        for part in quantize_groups(x, blocks, i, scale_format=scale_format)[2:]
    ]
    sizes = jnp.diff(prefix_ends(where.group_sizes, k), prepend=0)
    run = K_GROUPED_FP8 if addend is None else K_GROUPED_FP8_ADD
    arrays = (*quantised, sizes, where.group_offset, *(() if addend is None else (addend,)))
    return run(*arrays, rows_format="blocks", num_groups=count, **vars(options))[0]


def _check_named(op: str, a: jax.Array, b: jax.Array, a_rows: Any, b_rows: Any) -> tuple[str, jax.Array]:
    """Which operand an index names rows of, and the index [k]; k of the other operand is compared."""
    if (a_rows is None) == (b_rows is None):
        raise TypeError(
            f"{op}: got {'neither' if a_rows is None else 'both'} of a_rows and b_rows, need exactly one. "
            f"Without any use {op.replace('gathered', 'contiguous')}; with both take the rows of one first."
        )
    side = "a" if b_rows is None else "b"
    index = _check_index(op, f"{side}_rows", a_rows if side == "a" else b_rows, "a row for each place of k")
    other, k = (b if side == "a" else a), index.shape[0]
    if other.shape[0] != k:
        raise ValueError(
            f"{op}: {side}_rows is int32 [{k}] and {'ba'['ab'.index(side)]} is {describe(other)}: k differs "
            f"({k} and {other.shape[0]}). Name a row of {side} for each row of the other operand."
        )
    return side, index


def _m_bf16(
    op: str, layout: str, a: Any, b: Any, rows: Any, groups: checks.Rows, expected_m: Any, options: Options
) -> jax.Array:
    left, right, (t, n, k) = checks.check_bf16(op, checks.m_grouped_sides(layout), a, b)
    index = _check_index(op, "rows", rows, "a row of a for each row of the product, -1 for none")
    where = checks.check_rows(op, groups, index.shape[0], right.shape[0])
    hint = checks.check_expected_m(op, expected_m)
    if 0 in (index.shape[0], n, k, t):
        return _nothing("mk,gnk->mn" if layout == "nt" else "mk,gkn->mn", left, right, index, options)
    arrays = (left, right, index, where.group_sizes, where.group_offset)
    described = {"rows_format": where.rows_format, "expected_m": hint}
    return ops.M_GATHERED_BF16[layout](*arrays, **described, **vars(options))[0]


def _check_index(op: str, name: str, index: Any, what: str) -> jax.Array:
    """int32 [m]; numbers that int32 has not are no rows, as they were."""
    found = checks.as_int32(op, name, index, "[m]")
    if found.ndim != 1:
        raise ValueError(f"{op}: {name} is {describe(index)}, need int32 [m]: {what}.")
    return found


def _nothing(subscripts: str, a: jax.Array, b: jax.Array, index: jax.Array, options: Options) -> jax.Array:
    return empty_product(subscripts, take(a, index)[0], b, options)
