"""Products that DeepGEMM gives to cuBLASLt, and that XLA gives to it here."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.deep_gemm.calls import check_not_written
from jax_deepgemm.ops.gemm.api import bf16_gemm_nn, bf16_gemm_nt

__all__ = [
    "batched_symm",
    "batched_syrk",
    "cublaslt_gemm_nn",
    "cublaslt_gemm_nt",
    "cublaslt_gemm_tn",
    "cublaslt_gemm_tt",
]


def cublaslt_gemm_nt(
    a: ArrayLike, b: ArrayLike, d: None = None, c: ArrayLike | None = None, out_dtype: DTypeLike | None = None
) -> jax.Array:
    """D = C + A @ B.T by XLA, which has cuBLASLt on GPUs: `jax.lax.dot_general` with float32 sums.

    >>> cublaslt_gemm_nt(jnp.ones((4, 16), jnp.bfloat16), jnp.ones((8, 16), jnp.bfloat16)).shape
    (4, 8)

    Args:
      a: [m, k] of a floating type, FP8 without scales too.
      b: [n, k] of one.
      d: None: the value is returned.
      c: [m, n], added in float32.
      out_dtype: of the result; None: that of c, or bfloat16.

    Returns:
      [m, n] in out_dtype.

    Raises:
      TypeError: d is given.
      ValueError, TypeError: of `jax.lax.dot_general`, where operands do not fit each other.

    Source: DeepGEMM's function of this name.
    """
    return _dot("cublaslt_gemm_nt", a, b, d, c, out_dtype)


def cublaslt_gemm_nn(
    a: ArrayLike, b: ArrayLike, d: None = None, c: ArrayLike | None = None, out_dtype: DTypeLike | None = None
) -> jax.Array:
    """D = C + A @ B by XLA, which has cuBLASLt on GPUs: `jax.lax.dot_general` with float32 sums.

    >>> cublaslt_gemm_nn(jnp.ones((4, 16), jnp.bfloat16), jnp.ones((16, 8), jnp.bfloat16)).shape
    (4, 8)

    Args:
      a: [m, k] of a floating type.
      b: [k, n] of one.
      d, c, out_dtype: as in `cublaslt_gemm_nt`.

    Returns:
      [m, n] in out_dtype.

    Raises:
      TypeError, ValueError: as `cublaslt_gemm_nt`.

    Source: DeepGEMM's function of this name.
    """
    return _dot("cublaslt_gemm_nn", a, b, d, c, out_dtype)


def cublaslt_gemm_tn(
    a: ArrayLike, b: ArrayLike, d: None = None, c: ArrayLike | None = None, out_dtype: DTypeLike | None = None
) -> jax.Array:
    """D = C + A.T @ B by XLA, which has cuBLASLt on GPUs: `jax.lax.dot_general` with float32 sums.

    >>> cublaslt_gemm_tn(jnp.ones((16, 4), jnp.bfloat16), jnp.ones((16, 8), jnp.bfloat16)).shape
    (4, 8)

    Args:
      a: [k, m] of a floating type.
      b: [k, n] of one.
      d, c, out_dtype: as in `cublaslt_gemm_nt`.

    Returns:
      [m, n] in out_dtype.

    Raises:
      TypeError, ValueError: as `cublaslt_gemm_nt`.

    Source: DeepGEMM's function of this name.
    """
    return _dot("cublaslt_gemm_tn", a, b, d, c, out_dtype)


def cublaslt_gemm_tt(
    a: ArrayLike, b: ArrayLike, d: None = None, c: ArrayLike | None = None, out_dtype: DTypeLike | None = None
) -> jax.Array:
    """D = C + A.T @ B.T by XLA, which has cuBLASLt on GPUs: `jax.lax.dot_general` with float32 sums.

    >>> cublaslt_gemm_tt(jnp.ones((16, 4), jnp.bfloat16), jnp.ones((8, 16), jnp.bfloat16)).shape
    (4, 8)

    Args:
      a: [k, m] of a floating type.
      b: [n, k] of one.
      d, c, out_dtype: as in `cublaslt_gemm_nt`.

    Returns:
      [m, n] in out_dtype.

    Raises:
      TypeError, ValueError: as `cublaslt_gemm_nt`.

    Source: DeepGEMM's function of this name.
    """
    return _dot("cublaslt_gemm_tt", a, b, d, c, out_dtype)


def _dot(op: str, a: Any, b: Any, d: Any, c: Any, out_dtype: DTypeLike | None) -> jax.Array:
    check_not_written(op, d)
    a, b, c = jnp.asarray(unwrapped(a)), jnp.asarray(unwrapped(b)), unwrapped(c)
    dims = ((int(op[-2] == "n"),), (int(op[-1] == "t"),))
    product = lax.dot_general(a, b, (dims, ((), ())), preferred_element_type=jnp.float32)
    if c is not None:
        product = product + jnp.asarray(c).astype(jnp.float32)
    given = jnp.bfloat16 if c is None else c.dtype
    return product.astype(given if out_dtype is None else out_dtype)


def batched_syrk(a: ArrayLike, d: None = None, out_dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
    """D[i] = A[i] @ A[i].T for each matrix of a batch, as Muon's iteration needs it.

    Both halves are computed.

    >>> batched_syrk(jnp.ones((3, 4, 16), jnp.bfloat16)).shape
    (3, 4, 4)

    Args:
      a: [b, m, k] bfloat16.
      d: None: the value is returned.
      out_dtype: bfloat16 or float32.

    Returns:
      [b, m, m] in out_dtype.

    Raises:
      TypeError: d is given.
      ValueError: another rank or type.

    `jax.vmap` of `bf16_gemm_nt`. Source: DeepGEMM's function of this name.
    """
    check_not_written("batched_syrk", d, ", with out_dtype= for its type")
    x = _batch("batched_syrk", "a", a)
    return jax.vmap(lambda one: bf16_gemm_nt(one, one, out_dtype=out_dtype))(x)


def batched_symm(
    a: ArrayLike, b: ArrayLike, d: None = None, out_dtype: DTypeLike = jnp.bfloat16
) -> jax.Array:
    """D[i] = A[i] @ B[i] for each pair of a batch, A symmetric.

    Nothing is gained by the symmetry: all of A is read, and a matrix that is not symmetric is multiplied as
    it is.

    >>> batched_symm(jnp.ones((3, 4, 4), jnp.bfloat16), jnp.ones((3, 4, 16), jnp.bfloat16)).shape
    (3, 4, 16)

    Args:
      a: [b, m, m] bfloat16.
      b: [b, m, n] bfloat16.
      d: None: the value is returned.
      out_dtype: bfloat16 or float32.

    Returns:
      [b, m, n] in out_dtype.

    Raises:
      TypeError: d is given.
      ValueError: another rank or type, shapes that do not fit each other.

    `jax.vmap` of `bf16_gemm_nn`. Source: DeepGEMM's function of this name.
    """
    check_not_written("batched_symm", d, ", with out_dtype= for its type")
    x, y = _batch("batched_symm", "a", a), _batch("batched_symm", "b", b)
    if x.shape[1] != x.shape[2] or x.shape[0] != y.shape[0]:
        raise ValueError(
            f"batched_symm: a is {list(x.shape)} and b is {list(y.shape)}, need [b, m, m] and [b, m, n]."
        )
    return jax.vmap(lambda one, other: bf16_gemm_nn(one, other, out_dtype=out_dtype))(x, y)


def _batch(op: str, name: str, given: Any) -> jax.Array:
    x = jnp.asarray(unwrapped(given))
    if x.ndim != 3 or x.dtype != np.dtype(jnp.bfloat16):
        raise ValueError(
            f"{op}: {name} is {x.dtype.name} {list(x.shape)}, need bfloat16 of three dimensions, a batch of "
            "matrices. For other types: jnp.einsum."
        )
    return x
