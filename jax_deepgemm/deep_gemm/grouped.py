"""Grouped products: groups of rows behind each other, in equal storage, or groups of k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike

from jax_deepgemm.deep_gemm.calls import (
    Half,
    Recipe,
    blocks_of,
    check_dims,
    check_given,
    check_not_written,
    operand,
    result_dtype,
    run,
)
from jax_deepgemm.deep_gemm.groups import described, k_groups, side_by_side
from jax_deepgemm.ops.grouped import api as grouped
from jax_deepgemm.ops.quantize import PreparedFp4
from jax_deepgemm.ops.quantize.array import QuantizedLike

__all__ = [
    "bf16_m_grouped_gemm_nt_masked",
    "fp8_m_grouped_gemm_nt_masked",
    "k_grouped_bf16_gemm_tn_contiguous",
    "k_grouped_fp8_gemm_nt_contiguous",
    "k_grouped_fp8_gemm_tn_contiguous",
    "m_grouped_bf16_gemm_nn_contiguous",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nt_masked",
    "m_grouped_fp8_fp4_gemm_nn_contiguous",
    "m_grouped_fp8_fp4_gemm_nt_contiguous",
    "m_grouped_fp8_fp4_gemm_nt_masked",
    "m_grouped_fp8_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
]


def m_grouped_fp8_fp4_gemm_nt_contiguous(
    a: QuantizedLike,
    b: QuantizedLike | PreparedFp4,
    d: None = None,
    grouped_layout: ArrayLike | None = None,
    recipe: Recipe = None,
    recipe_a: Half = None,
    recipe_b: Half = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
    **options: Any,
) -> jax.Array:
    """D = A @ B[g].T for the rows of each group g, of FP8 operands: groups of rows behind each other.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> a = jnp.ones((6, 128), jnp.float8_e4m3fn), jnp.ones((6, 1))
    >>> b = jnp.ones((3, 128, 128), jnp.float8_e4m3fn), jnp.ones((3, 1, 1))
    >>> d = deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, grouped_layout=jnp.array([0, 0, 2, 2, 2, -1]))
    >>> d[:, 0].tolist()
    [128.0, 128.0, 128.0, 128.0, 128.0, 0.0]

    With ends of groups, here of groups that begin at multiples of 2 rows:

    >>> ends = jnp.array([2, 2, 5])
    >>> same = deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
    ...     a, b, grouped_layout=ends, use_psum_layout=True, mk_alignment=2)
    >>> bool((same == d).all())
    True

    Args:
      a: (values [m, k], scales [m, ceil(k / 128)]), or a QuantizedArray.
      b: (values [g, n, k], scales [g, ceil(n / 128), ceil(k / 128)] or [g, n, ceil(k / 128)]), or a
        QuantizedArray; or FP4, as in `fp8_fp4_gemm_nt`, for each group.
      d: None: the value is returned.
      grouped_layout: integers [m], the group of each row, -1 for none, in which rows of a group stand
        together, in any number; or [g] with use_psum_layout, where each group ends. Then a group starts where
        the one before ended, rounded up to `config.mk_alignment` (128).
      recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast: as in `fp8_fp4_gemm_nt`.
      use_psum_layout: whether grouped_layout are ends.
      ensure_zero_padding: changes nothing: rows of no group are always zero.
      expected_m_for_psum_layout: rows of a typical group, with use_psum_layout; changes no number.
      options: keyword arguments of `jax_deepgemm.m_grouped_fp8_gemm_nt_contiguous` (out_dtype, ..), and
        settings of `jax_deepgemm.config` for this call (mk_alignment, num_sms, ..).

    Returns:
      [m, n] in bfloat16, or in out_dtype. Rows of no group are zero, whatever a holds there.

    Raises:
      TypeError: d is given, grouped_layout is not, an operand is not quantised.
      ValueError: shapes, types or recipes that do not fit; of a NumPy grouped_layout, groups in pieces, and
        ends that do not keep the alignment. On the device these cannot be seen: of a group in pieces, rows
        behind those of another group are zero, and -1 inside a group counts as the group
        (`jax_deepgemm.grouped.check_m_indices` reports both); with ends of another alignment, rows count to
        no group or to a wrong one.
      NotImplementedError: an a of packed FP4.

    Source: DeepGEMM's function of this name, whose index layout asks for groups of whole tiles of rows, and
    takes the group of a tile's first row for all of it.
    """
    more = (recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast)
    rows = (grouped_layout, use_psum_layout, expected_m_for_psum_layout)
    return _m_grouped_fp8("nt", a, b, d, rows, more, options)


def m_grouped_fp8_fp4_gemm_nn_contiguous(
    a: QuantizedLike,
    b: QuantizedLike,
    d: None = None,
    grouped_layout: ArrayLike | None = None,
    recipe: Recipe = None,
    recipe_a: Half = None,
    recipe_b: Half = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    **options: Any,
) -> jax.Array:
    """D = A @ B[g] for the rows of each group g, of FP8 operands, b stored [g, k, n].

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> a = jnp.ones((3, 128), jnp.float8_e4m3fn), jnp.ones((3, 1))
    >>> b = jnp.ones((2, 128, 256), jnp.float8_e4m3fn), jnp.ones((2, 1, 2))
    >>> deep_gemm.m_grouped_fp8_gemm_nn_contiguous(a, b, grouped_layout=jnp.array([0, 1, 1])).shape
    (3, 256)

    Args:
      a: (values [m, k], scales [m, ceil(k / 128)]), or a QuantizedArray.
      b: (values [g, k, n], scales [g, ceil(k / 128), ceil(n / 128)] or [g, ceil(k / 128), n]), or a
        QuantizedArray.
      d, grouped_layout, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast, use_psum_layout,
        ensure_zero_padding, options: as in `m_grouped_fp8_fp4_gemm_nt_contiguous`.

    Returns:
      [m, n] in bfloat16, or in out_dtype. Rows of no group are zero.

    Raises:
      TypeError, ValueError, NotImplementedError: as `m_grouped_fp8_fp4_gemm_nt_contiguous`.

    Source: DeepGEMM's function of this name, which needs compute capability 10 for it.
    """
    more = (recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast)
    return _m_grouped_fp8("nn", a, b, d, (grouped_layout, use_psum_layout, None), more, options)


def m_grouped_bf16_gemm_nt_contiguous(
    a: ArrayLike,
    b: ArrayLike,
    d: None = None,
    grouped_layout: ArrayLike | None = None,
    compiled_dims: str = "nk",
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
    **options: Any,
) -> jax.Array:
    """D = A @ B[g].T for the rows of each group g, of bfloat16 operands: groups of rows behind each other.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> x, w = jnp.ones((3, 16), jnp.bfloat16), jnp.ones((2, 8, 16), jnp.bfloat16)
    >>> deep_gemm.m_grouped_bf16_gemm_nt_contiguous(x, w, grouped_layout=jnp.array([0, -1, 1]))[:, 0].tolist()
    [16.0, 0.0, 16.0]

    Args:
      a: [m, k] bfloat16.
      b: [g, n, k] bfloat16.
      d, grouped_layout, compiled_dims, use_psum_layout, ensure_zero_padding, expected_m_for_psum_layout,
        options: as in `m_grouped_fp8_fp4_gemm_nt_contiguous`.

    Returns:
      [m, n] in bfloat16, or in out_dtype. Rows of no group are zero.

    Raises:
      TypeError, ValueError: as `m_grouped_fp8_fp4_gemm_nt_contiguous`.

    Source: DeepGEMM's function of this name.
    """
    rows = (grouped_layout, use_psum_layout, expected_m_for_psum_layout)
    return _m_grouped_bf16("nt", a, b, d, rows, compiled_dims, options)


def m_grouped_bf16_gemm_nn_contiguous(
    a: ArrayLike,
    b: ArrayLike,
    d: None = None,
    grouped_layout: ArrayLike | None = None,
    compiled_dims: str = "nk",
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    **options: Any,
) -> jax.Array:
    """D = A @ B[g] for the rows of each group g, of bfloat16 operands, b stored [g, k, n].

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> x, w = jnp.ones((3, 16), jnp.bfloat16), jnp.ones((2, 16, 8), jnp.bfloat16)
    >>> deep_gemm.m_grouped_bf16_gemm_nn_contiguous(x, w, grouped_layout=jnp.array([0, 1, 1])).shape
    (3, 8)

    Args:
      a: [m, k] bfloat16.
      b: [g, k, n] bfloat16.
      d, grouped_layout, compiled_dims, use_psum_layout, ensure_zero_padding, options: as in
        `m_grouped_fp8_fp4_gemm_nt_contiguous`.

    Returns:
      [m, n] in bfloat16, or in out_dtype. Rows of no group are zero.

    Raises:
      TypeError, ValueError: as `m_grouped_fp8_fp4_gemm_nt_contiguous`.

    Source: DeepGEMM's function of this name.
    """
    return _m_grouped_bf16("nn", a, b, d, (grouped_layout, use_psum_layout, None), compiled_dims, options)


def m_grouped_fp8_fp4_gemm_nt_masked(
    a: QuantizedLike,
    b: QuantizedLike | PreparedFp4,
    d: None = None,
    masked_m: ArrayLike | None = None,
    expected_m: int | None = None,
    recipe: Recipe = None,
    recipe_a: Half = None,
    recipe_b: Half = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    **options: Any,
) -> jax.Array:
    """D[g, :masked_m[g]] = A[g, :masked_m[g]] @ B[g].T of FP8 operands: equal storage for each group.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> a = jnp.ones((2, 4, 128), jnp.float8_e4m3fn), jnp.ones((2, 4, 1))
    >>> b = jnp.ones((2, 256, 128), jnp.float8_e4m3fn), jnp.ones((2, 2, 1))
    >>> deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, masked_m=jnp.array([1, 4]), expected_m=2).shape
    (2, 4, 256)

    Args:
      a: (values [g, m, k], scales [g, m, ceil(k / 128)]), or a QuantizedArray. Any m.
      b: (values [g, n, k], scales [g, ceil(n / 128), ceil(k / 128)] or [g, n, ceil(k / 128)]), or a
        QuantizedArray; or FP4, as in `fp8_fp4_gemm_nt`, for each group.
      d: None: the value is returned.
      masked_m: integers [g], rows of each group that count.
      expected_m: rows of a typical group, static, or None; changes no number.
      recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast: as in `fp8_fp4_gemm_nt`.
      options: keyword arguments of `jax_deepgemm.m_grouped_fp8_gemm_nt_masked` (zero_rows, out_dtype, ..),
        and settings of `jax_deepgemm.config` for this call.

    Returns:
      [g, m, n] in bfloat16, or in out_dtype; rows from masked_m[g] on are undefined, unless zero_rows=True.

    Raises:
      TypeError: d is given, masked_m is not, an operand is not quantised.
      ValueError: shapes, types or recipes that do not fit.
      NotImplementedError: an a of packed FP4.

    Source: DeepGEMM's function of this name.
    """
    op = "m_grouped_fp8_gemm_nt_masked"
    check_not_written(op, d)
    check_given(op, masked_m=masked_m)
    check_dims(op, compiled_dims)
    block_a, block_b = blocks_of(op, recipe, recipe_a, recipe_b)
    left, right = operand(op, "a", a, block_a), operand(op, "b", b, block_b, weight=True)
    result: jax.Array = run(
        grouped.m_grouped_fp8_gemm_nt_masked, left, right, masked_m, expected_m, **options
    )
    return result


def m_grouped_bf16_gemm_nt_masked(
    a: ArrayLike,
    b: ArrayLike,
    d: None = None,
    masked_m: ArrayLike | None = None,
    expected_m: int | None = None,
    compiled_dims: str = "nk",
    **options: Any,
) -> jax.Array:
    """D[g, :masked_m[g]] = A[g, :masked_m[g]] @ B[g].T of bfloat16 operands: equal storage for each group.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> a, b = jnp.ones((2, 4, 16), jnp.bfloat16), jnp.ones((2, 8, 16), jnp.bfloat16)
    >>> deep_gemm.m_grouped_bf16_gemm_nt_masked(a, b, masked_m=jnp.array([1, 4]), expected_m=2).shape
    (2, 4, 8)

    Args:
      a: [g, m, k] bfloat16.
      b: [g, n, k] bfloat16.
      d, masked_m, expected_m, compiled_dims, options: as in `m_grouped_fp8_fp4_gemm_nt_masked`.

    Returns:
      [g, m, n] in bfloat16, or in out_dtype; rows from masked_m[g] on are undefined, unless zero_rows=True.

    Raises:
      TypeError, ValueError: as `m_grouped_fp8_fp4_gemm_nt_masked`.

    Source: DeepGEMM's function of this name.
    """
    op = "m_grouped_bf16_gemm_nt_masked"
    check_not_written(op, d)
    check_given(op, masked_m=masked_m)
    check_dims(op, compiled_dims)
    result: jax.Array = run(grouped.m_grouped_bf16_gemm_nt_masked, a, b, masked_m, expected_m, **options)
    return result


def k_grouped_fp8_gemm_nt_contiguous(
    a: QuantizedLike,
    b: QuantizedLike,
    d: None = None,
    ks_cpu: Sequence[int] | None = None,
    grouped_layout: ArrayLike | None = None,
    c: ArrayLike | None = None,
    recipe: Recipe = (1, 1, 128),
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
    **options: Any,
) -> jax.Array:
    """D[g] = C[g] + A[:, columns of g] @ B[:, columns of g].T of FP8 operands: weight gradients of experts.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> a = jnp.ones((8, 384), jnp.float8_e4m3fn), jnp.ones((8, 3))
    >>> b = jnp.ones((4, 384), jnp.float8_e4m3fn), jnp.ones((4, 3))
    >>> sizes = jnp.array([128, 256])
    >>> deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, grouped_layout=sizes)[:, 0, 0].tolist()
    [128.0, 256.0]

    Args:
      a: (values, scales [m, ceil(k / 128)]), or a QuantizedArray: values [m, k], or [m k], in which the
        columns of each group are a matrix of their own, as DeepGEMM has them (ks_cpu are needed then, and the
        values are copied).
      b: the same, values [n, k], or [n k].
      d: None: the value is returned.
      ks_cpu: the sizes, on the host; needed for values of one dimension only.
      grouped_layout: integers [g]: columns of each group; or with use_psum_layout where each ends, as in
        `m_grouped_fp8_fp4_gemm_nt_contiguous`. None: ks_cpu.
      c: [g, m, n], added, or None.
      recipe: (1, 1, 128).
      compiled_dims: letters of "mnk"; changes nothing.
      use_psum_layout: whether grouped_layout are ends.
      options: keyword arguments of `jax_deepgemm.k_grouped_fp8_gemm_nt_contiguous` (out_dtype, ..), and
        settings of `jax_deepgemm.config` for this call.

    Returns:
      [g, m, n] in float32, or in out_dtype. Groups of no columns are C, or zeros. Groups may end anywhere.

    Raises:
      TypeError: d is given, the groups are not, an operand is not quantised.
      ValueError: shapes, types or recipes that do not fit; ends in NumPy that do not keep the alignment.

    Source: DeepGEMM's function of this name, which needs C.
    """
    op = "k_grouped_fp8_gemm_nt_contiguous"
    groups = k_groups(op, d, ks_cpu, grouped_layout, compiled_dims, use_psum_layout, options)
    halves = blocks_of(op, recipe)
    sides = [
        operand(op, name, side_by_side(op, name, x, ks_cpu), half)
        for name, x, half in zip("ab", (a, b), halves)
    ]
    result: jax.Array = run(
        grouped.k_grouped_fp8_gemm_nt_contiguous, *sides, groups, c, **result_dtype(options, c)
    )
    return result


def k_grouped_fp8_gemm_tn_contiguous(
    a: QuantizedLike,
    b: QuantizedLike,
    d: None = None,
    ks_cpu: Sequence[int] | None = None,
    grouped_layout: ArrayLike | None = None,
    c: ArrayLike | None = None,
    recipe: Recipe = (1, 1, 128),
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
    **options: Any,
) -> jax.Array:
    """D[g] = C[g] + A[rows of g].T @ B[rows of g] of FP8 operands, stored [k, m] and [k, n].

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> a = jnp.ones((384, 8), jnp.float8_e4m3fn), jnp.ones((3, 8))
    >>> b = jnp.ones((384, 4), jnp.float8_e4m3fn), jnp.ones((3, 4))
    >>> deep_gemm.k_grouped_fp8_gemm_tn_contiguous(a, b, grouped_layout=jnp.array([128, 256])).shape
    (2, 8, 4)

    Args:
      a: (values [k, m], scales [ceil(k / 128), m]), or a QuantizedArray.
      b: (values [k, n], scales [ceil(k / 128), n]), or a QuantizedArray.
      d, ks_cpu, grouped_layout, c, recipe, compiled_dims, use_psum_layout, options: as in
        `k_grouped_fp8_gemm_nt_contiguous`.

    Returns:
      [g, m, n] in float32, or in out_dtype.

    Raises:
      TypeError, ValueError: as `k_grouped_fp8_gemm_nt_contiguous`.

    Source: DeepGEMM's function of this name, which needs compute capability 10.
    """
    op = "k_grouped_fp8_gemm_tn_contiguous"
    groups = k_groups(op, d, ks_cpu, grouped_layout, compiled_dims, use_psum_layout, options)
    block_a, block_b = blocks_of(op, recipe)
    left, right = operand(op, "a", a, block_a, k_last=False), operand(op, "b", b, block_b, k_last=False)
    result: jax.Array = run(
        grouped.k_grouped_fp8_gemm_tn_contiguous, left, right, groups, c, **result_dtype(options, c)
    )
    return result


def k_grouped_bf16_gemm_tn_contiguous(
    a: ArrayLike,
    b: ArrayLike,
    d: None = None,
    ks_cpu: Sequence[int] | None = None,
    grouped_layout: ArrayLike | None = None,
    c: ArrayLike | None = None,
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
    **options: Any,
) -> jax.Array:
    """D[g] = C[g] + A[rows of g].T @ B[rows of g] of bfloat16 operands: the weight gradients of experts.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> a, b = jnp.ones((10, 4), jnp.bfloat16), jnp.ones((10, 8), jnp.bfloat16)
    >>> deep_gemm.k_grouped_bf16_gemm_tn_contiguous(a, b, ks_cpu=[3, 0, 5])[:, 0, 0].tolist()
    [3.0, 0.0, 5.0]

    Args:
      a: [k, m] bfloat16.
      b: [k, n] bfloat16.
      d, ks_cpu, grouped_layout, c, compiled_dims, use_psum_layout, options: as in
        `k_grouped_fp8_gemm_nt_contiguous`.

    Returns:
      [g, m, n] in float32, or in out_dtype.

    Raises:
      TypeError, ValueError: as `k_grouped_fp8_gemm_nt_contiguous`.

    Source: DeepGEMM's function of this name, which needs C, and on Hopper groups of multiples of 128 rows.
    """
    op = "k_grouped_bf16_gemm_tn_contiguous"
    groups = k_groups(op, d, ks_cpu, grouped_layout, compiled_dims, use_psum_layout, options)
    result: jax.Array = run(
        grouped.k_grouped_bf16_gemm_tn_contiguous, a, b, groups, c, **result_dtype(options, c)
    )
    return result


m_grouped_fp8_gemm_nt_contiguous = m_grouped_fp8_fp4_gemm_nt_contiguous
m_grouped_fp8_gemm_nn_contiguous = m_grouped_fp8_fp4_gemm_nn_contiguous
m_grouped_fp8_gemm_nt_masked = fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_fp4_gemm_nt_masked
bf16_m_grouped_gemm_nt_masked = m_grouped_bf16_gemm_nt_masked


def _m_grouped_fp8(
    layout: str,
    a: Any,
    b: Any,
    d: Any,
    rows: tuple[Any, bool, int | None],
    more: tuple[Any, ...],
    options: dict[str, Any],
) -> jax.Array:
    op = f"m_grouped_fp8_gemm_{layout}_contiguous"
    recipe, recipe_a, recipe_b, compiled_dims, _ = more
    check_not_written(op, d)
    check_dims(op, compiled_dims)
    block_a, block_b = blocks_of(op, recipe, recipe_a, recipe_b)
    left, right = (
        operand(op, "a", a, block_a),
        operand(op, "b", b, block_b, k_last=layout == "nt", weight=layout == "nt"),
    )
    groups = described(op, *rows, options)
    result: jax.Array = run(getattr(grouped, op), left, right, **groups, **options)
    return result


def _m_grouped_bf16(
    layout: str,
    a: Any,
    b: Any,
    d: Any,
    rows: tuple[Any, bool, int | None],
    compiled_dims: str,
    options: dict[str, Any],
) -> jax.Array:
    op = f"m_grouped_bf16_gemm_{layout}_contiguous"
    check_not_written(op, d)
    check_dims(op, compiled_dims)
    groups = described(op, *rows, options)
    result: jax.Array = run(getattr(grouped, op), a, b, **groups, **options)
    return result
