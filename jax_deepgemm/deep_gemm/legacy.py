"""DeepGEMM's older grouped products, of which some take rows by an index: the kernel reads them from where
they are, as there (`jax_deepgemm.m_grouped_bf16_gemm_nt_gathered` and its like)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.deep_gemm.calls import check_given, check_not_written, result_dtype, run
from jax_deepgemm.deep_gemm.grouped import (
    m_grouped_bf16_gemm_nn_contiguous,
    m_grouped_bf16_gemm_nt_contiguous,
)
from jax_deepgemm.ops.gemm.checks import describe
from jax_deepgemm.ops.grouped import gathered
from jax_deepgemm.ops.grouped.layouts import Ranges

__all__ = [
    "a_fused_k_grouped_bf16_gemm_tn_contiguous_tl",
    "a_fused_m_grouped_bf16_gemm_nn_contiguous_tl",
    "a_fused_m_grouped_bf16_gemm_nt_contiguous_tl",
    "b_fused_k_grouped_bf16_gemm_tn_contiguous_tl",
    "m_grouped_bf16_gemm_nn_contiguous_tl",
    "m_grouped_bf16_gemm_nt_contiguous_tl",
]

Index = tuple[ArrayLike, ArrayLike]
Ranged = tuple[ArrayLike, ArrayLike, ArrayLike]


def m_grouped_bf16_gemm_nt_contiguous_tl(
    a: ArrayLike, b: ArrayLike, d: None = None, m_indices: ArrayLike | None = None, **options: Any
) -> jax.Array:
    """`m_grouped_bf16_gemm_nt_contiguous` of an index layout.

    >>> x, w = jnp.ones((3, 16), jnp.bfloat16), jnp.ones((2, 8, 16), jnp.bfloat16)
    >>> m_grouped_bf16_gemm_nt_contiguous_tl(x, w, m_indices=jnp.array([0, -1, 1]))[:, 0].tolist()
    [16.0, 0.0, 16.0]

    Args:
      a: [m, k] bfloat16.
      b: [g, n, k] bfloat16.
      d: None: the value is returned.
      m_indices: integers [m], the group of each row, -1 for none; rows of a group stand together.
      options: as in `m_grouped_bf16_gemm_nt_contiguous`.

    Returns:
      [m, n] in bfloat16, or in out_dtype. Rows of no group are zero.

    Raises:
      TypeError, ValueError: as `m_grouped_bf16_gemm_nt_contiguous`.

    Source: DeepGEMM's function of this name.
    """
    return m_grouped_bf16_gemm_nt_contiguous(a, b, d, m_indices, **options)


def m_grouped_bf16_gemm_nn_contiguous_tl(
    a: ArrayLike, b: ArrayLike, d: None = None, m_indices: ArrayLike | None = None, **options: Any
) -> jax.Array:
    """`m_grouped_bf16_gemm_nn_contiguous` of an index layout.

    >>> x, w = jnp.ones((3, 16), jnp.bfloat16), jnp.ones((2, 16, 8), jnp.bfloat16)
    >>> m_grouped_bf16_gemm_nn_contiguous_tl(x, w, m_indices=jnp.array([0, -1, 1]))[:, 0].tolist()
    [16.0, 0.0, 16.0]

    Args:
      a: [m, k] bfloat16.
      b: [g, k, n] bfloat16.
      d, m_indices, options: as in `m_grouped_bf16_gemm_nt_contiguous_tl`.

    Returns:
      [m, n] in bfloat16, or in out_dtype. Rows of no group are zero.

    Raises:
      TypeError, ValueError: as `m_grouped_bf16_gemm_nt_contiguous`.

    Source: DeepGEMM's function of this name.
    """
    return m_grouped_bf16_gemm_nn_contiguous(a, b, d, m_indices, **options)


def a_fused_m_grouped_bf16_gemm_nt_contiguous_tl(
    a: ArrayLike, b: ArrayLike, d: None = None, mappings: Index | None = None, **options: Any
) -> jax.Array:
    """D[i] = A[row of i] @ B[g].T for the rows i of each group g: A's rows are taken by an index.

    >>> x, w = jnp.array([[1.0] * 16, [2.0] * 16], jnp.bfloat16), jnp.ones((2, 8, 16), jnp.bfloat16)
    >>> mappings = jnp.array([0, 0, 1, 1]), jnp.array([1, 0, 1, -1])
    >>> a_fused_m_grouped_bf16_gemm_nt_contiguous_tl(x, w, mappings=mappings)[:, 0].tolist()
    [32.0, 16.0, 32.0, 0.0]

    Args:
      a: [rows, k] bfloat16.
      b: [g, n, k] bfloat16.
      d: None: the value is returned.
      mappings: (m_indices, m_row_indices), integers [m] each: the group of each row of the result, as in
        `m_grouped_bf16_gemm_nt_contiguous_tl`, and the row of a, -1 for a row of zeros.
      options: as in `m_grouped_bf16_gemm_nt_contiguous`.

    Returns:
      [m, n] in bfloat16, or in out_dtype.

    Raises:
      TypeError: d is given, mappings are not.
      ValueError: shapes or types that do not fit each other.

    Differentiable with respect to a and b. Source: DeepGEMM's function of this name.
    """
    return _a_fused("nt", a, b, d, mappings, options)


def a_fused_m_grouped_bf16_gemm_nn_contiguous_tl(
    a: ArrayLike, b: ArrayLike, d: None = None, mappings: Index | None = None, **options: Any
) -> jax.Array:
    """D[i] = A[row of i] @ B[g] for the rows i of each group g: A's rows are taken by an index.

    >>> x, w = jnp.ones((2, 16), jnp.bfloat16), jnp.ones((2, 16, 8), jnp.bfloat16)
    >>> mappings = jnp.array([0, 0, 1, 1]), jnp.array([1, 0, 1, -1])
    >>> a_fused_m_grouped_bf16_gemm_nn_contiguous_tl(x, w, mappings=mappings).shape
    (4, 8)

    Args:
      a: [rows, k] bfloat16.
      b: [g, k, n] bfloat16.
      d, mappings, options: as in `a_fused_m_grouped_bf16_gemm_nt_contiguous_tl`.

    Returns:
      [m, n] in bfloat16, or in out_dtype.

    Raises:
      TypeError, ValueError: as `a_fused_m_grouped_bf16_gemm_nt_contiguous_tl`.

    Source: DeepGEMM's function of this name.
    """
    return _a_fused("nn", a, b, d, mappings, options)


def a_fused_k_grouped_bf16_gemm_tn_contiguous_tl(
    a: ArrayLike,
    b: ArrayLike,
    d: None = None,
    mappings: Ranged | None = None,
    acc: bool = False,
    c: ArrayLike | None = None,
    **options: Any,
) -> jax.Array:
    """D[g] = C[g] + sum of the outer products of A[row of i] and B[i] over i in the range of group g.

    >>> x, dy = jnp.ones((2, 4), jnp.bfloat16), jnp.ones((5, 8), jnp.bfloat16)
    >>> mappings = jnp.array([0, 1, -1, 1, 1]), jnp.array([0, 3]), jnp.array([3, 5])
    >>> a_fused_k_grouped_bf16_gemm_tn_contiguous_tl(x, dy, mappings=mappings)[:, 0, 0].tolist()
    [2.0, 2.0]

    Args:
      a: [rows, m] bfloat16.
      b: [k, n] bfloat16.
      d: None: the value is returned.
      mappings: (k_indices [k], k_start [g], k_end [g]), integers: the row of a for each row of b, -1 for
        none, and the range of each group. Ranges may end anywhere, and be empty.
      acc: whether c is added.
      c: [g, m, n], bfloat16 or float32, with acc=True.
      options: keyword arguments of `jax_deepgemm.k_grouped_bf16_gemm_tn_contiguous` (out_dtype, ..), and
        settings of `jax_deepgemm.config` for this call.

    Returns:
      [g, m, n] in float32, or in the type of c, or in out_dtype. Empty groups are C, or zeros.

    Raises:
      TypeError: d is given, mappings are not.
      ValueError: shapes or types that do not fit each other; acc without c, or c without acc.

    Differentiable with respect to a, b and c. Source: DeepGEMM's function of this name.
    """
    return _k_fused("a", a, b, d, mappings, (acc, c), options)


def b_fused_k_grouped_bf16_gemm_tn_contiguous_tl(
    a: ArrayLike,
    b: ArrayLike,
    d: None = None,
    mappings: Ranged | None = None,
    acc: bool = False,
    c: ArrayLike | None = None,
    **options: Any,
) -> jax.Array:
    """D[g] = C[g] + sum of the outer products of A[i] and B[row of i] over i in the range of group g.

    >>> dy, x = jnp.ones((5, 4), jnp.bfloat16), jnp.ones((2, 8), jnp.bfloat16)
    >>> mappings = jnp.array([0, 1, -1, 1, 1]), jnp.array([0, 3]), jnp.array([3, 5])
    >>> b_fused_k_grouped_bf16_gemm_tn_contiguous_tl(dy, x, mappings=mappings)[:, 0, 0].tolist()
    [2.0, 2.0]

    Args:
      a: [k, m] bfloat16.
      b: [rows, n] bfloat16.
      d: None: the value is returned.
      mappings: (k_indices [k], k_start [g], k_end [g]), integers: the row of b for each row of a, -1 for
        none, and the range of each group.
      acc: whether c is added.
      c: [g, m, n], bfloat16 or float32, with acc=True.
      options: as in `a_fused_k_grouped_bf16_gemm_tn_contiguous_tl`.

    Returns:
      [g, m, n] in float32, or in the type of c, or in out_dtype. Empty groups are C, or zeros.

    Raises:
      TypeError, ValueError: as `a_fused_k_grouped_bf16_gemm_tn_contiguous_tl`.

    Source: DeepGEMM's function of this name.
    """
    return _k_fused("b", a, b, d, mappings, (acc, c), options)


def _a_fused(layout: str, a: Any, b: Any, d: Any, mappings: Any, options: dict[str, Any]) -> jax.Array:
    op = f"a_fused_m_grouped_bf16_gemm_{layout}_contiguous_tl"
    check_not_written(op, d)
    m_indices, rows = _taken(op, mappings, "(m_indices, m_row_indices)", 2)
    product = getattr(gathered, f"m_grouped_bf16_gemm_{layout}_gathered")
    result: jax.Array = run(product, a, b, rows, m_indices=m_indices, **options)
    return result


def _k_fused(
    side: str, a: Any, b: Any, d: Any, mappings: Any, added: tuple[bool, Any], options: dict[str, Any]
) -> jax.Array:
    op, (acc, c) = f"{side}_fused_k_grouped_bf16_gemm_tn_contiguous_tl", added
    check_not_written(op, d)
    if acc is not (c is not None):
        raise ValueError(
            f"{op}: acc is {acc} and c is {describe(unwrapped(c))}, need acc=True with c, or neither."
        )
    rows, starts, ends = _taken(op, mappings, "(k_indices, k_start, k_end)", 3)
    product, groups = gathered.k_grouped_bf16_gemm_tn_gathered, Ranges(starts, ends)
    named = {f"{side}_rows": rows}
    result: jax.Array = run(product, a, b, groups, c, **named, **result_dtype(options, c))
    return result


def _taken(op: str, mappings: Any, need: str, count: int) -> list[jax.Array]:
    check_given(op, mappings=mappings)
    if not isinstance(mappings, (tuple, list)) or len(mappings) != count:
        raise ValueError(f"{op}: mappings are {describe(mappings)}, need {need}.")
    return [jnp.asarray(unwrapped(one)).astype(jnp.int32) for one in mappings]
