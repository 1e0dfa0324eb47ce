"""einsum, and the product in front of a hyper-connection."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.deep_gemm.calls import Recipe, blocks_of, check_not_written, operand, result_dtype, run
from jax_deepgemm.ops.einsum import api as einsums
from jax_deepgemm.ops.hc_prenorm import hc_prenorm_gemm
from jax_deepgemm.ops.quantize.array import QuantizedLike

__all__ = ["einsum", "fp8_einsum", "tf32_hc_prenorm_gemm"]


def einsum(
    expr: str,
    a: ArrayLike,
    b: ArrayLike,
    d: None = None,
    c: ArrayLike | None = None,
    use_cublaslt: bool = False,
    **options: Any,
) -> jax.Array:
    """D = C + einsum(expr, a, b) of bfloat16 operands: `jax_deepgemm.bf16_einsum`.

    >>> from jax_deepgemm import deep_gemm
    >>> x, w = jnp.ones((4, 2, 64), jnp.bfloat16), jnp.ones((2, 16, 64), jnp.bfloat16)
    >>> deep_gemm.einsum("bhr,hdr->bhd", x, w).shape
    (4, 2, 16)

    Args:
      expr: "bhr,hdr->bhd", "bhd,hdr->bhr", "bmk,bnk->mn", or another that is one matrix product.
      a: bfloat16, [..] as the first term says.
      b: bfloat16, [..] as the second term says.
      d: None: the value is returned.
      c: [..] of the result's shape, bfloat16 or float32, added; the result has its type unless out_dtype says
        another.
      use_cublaslt: whether XLA multiplies, which takes any einsum.
      options: keyword arguments of `jax_deepgemm.bf16_einsum` (out_dtype, config, ..; of XLA's out_dtype
        alone), and settings of `jax_deepgemm.config` for this call.

    Returns:
      The result in bfloat16, or in out_dtype.

    Raises:
      TypeError: d is given, an operand is no array.
      ValueError: an einsum that is not one matrix product; shapes or types that do not fit each other.

    Deterministic, also where a sum is divided among SMs. Source: DeepGEMM's function of this name, which adds
    those parts in any order.
    """
    check_not_written("einsum", d)
    options = result_dtype(options, c)
    if not use_cublaslt:
        result: jax.Array = run(einsums.bf16_einsum, expr, a, b, c, **options)
        return result
    product = jnp.einsum(expr, unwrapped(a), unwrapped(b), preferred_element_type=jnp.float32)
    product = product if c is None else product + jnp.asarray(unwrapped(c)).astype(jnp.float32)
    return product.astype(options.get("out_dtype", jnp.bfloat16))


def fp8_einsum(
    expr: str,
    a: QuantizedLike,
    b: QuantizedLike,
    d: None = None,
    c: ArrayLike | None = None,
    recipe: Recipe = None,
    **options: Any,
) -> jax.Array:
    """D = C + einsum(expr, a, b) of FP8 operands: `jax_deepgemm.fp8_einsum` as DeepGEMM's users call it.

    >>> from jax_deepgemm import deep_gemm, quantize
    >>> x, w = quantize(jnp.ones((4, 2, 256))), quantize(jnp.ones((2, 128, 256)), (128, 128))
    >>> deep_gemm.fp8_einsum("bhr,hdr->bhd", x, w).shape
    (4, 2, 128)

    Args:
      expr: "bhr,hdr->bhd", or another that is one matrix product, whose summed letter is the last of both
        operands.
      a: (values, scales), values [..] as the first term says, scales with ceil(k / 128) for the last
        dimension; or a QuantizedArray.
      b: the same as the second term says, or with scales of 128 x 128: (values [h, d, r], scales [h, ceil(d /
        128), ceil(r / 128)]), or a QuantizedArray.
      d: None: the value is returned.
      c: [..] of the result's shape, bfloat16 or float32, added.
      recipe: (rows of a, rows of b, elements of k) that share a scale; None: the shapes tell.
      options: keyword arguments of `jax_deepgemm.fp8_einsum` (out_dtype, config, ..), and settings of
        `jax_deepgemm.config` for this call.

    Returns:
      The result in bfloat16, or in out_dtype.

    Raises:
      TypeError: d is given, an operand is not quantised.
      ValueError: an einsum that is not one matrix product, or whose summed letter is not the last ("bhd,hdr"
        and "bhd,bhr" need compute capability 10 in DeepGEMM; here, operands that are quantised so); shapes,
        types or recipes that do not fit.

    Source: DeepGEMM's function of this name.
    """
    check_not_written("fp8_einsum", d)
    block_a, block_b = blocks_of("fp8_einsum", recipe)
    left, right = operand("fp8_einsum", "a", a, block_a), operand("fp8_einsum", "b", b, block_b)
    result: jax.Array = run(einsums.fp8_einsum, expr, left, right, c, **result_dtype(options, c))
    return result


def tf32_hc_prenorm_gemm(
    a: ArrayLike,
    b: ArrayLike,
    d: None = None,
    sqr_sum: None = None,
    num_splits: int | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """A projection of rows, and the sums of their squares: `jax_deepgemm.hc_prenorm_gemm`.

    >>> from jax_deepgemm import deep_gemm
    >>> d, sqr_sum = deep_gemm.tf32_hc_prenorm_gemm(jnp.ones((3, 128), jnp.bfloat16), jnp.ones((8, 128)))
    >>> d.shape, sqr_sum.tolist()
    ((3, 8), [128.0, 128.0, 128.0])

    Args:
      a: [m, k] bfloat16.
      b: [n, k] float32.
      d: None: the value is returned.
      sqr_sum: None: the value is returned.
      num_splits: None for the whole sums; S for those over S parts of k, which the caller adds up.
      options: keyword arguments of `jax_deepgemm.hc_prenorm_gemm` (config, out_sharding), and settings of
        `jax_deepgemm.config` for this call.

    Returns:
      (d [m, n], sqr_sum [m]) in float32, or ([S, m, n], [S, m]).

    Raises:
      TypeError: d or sqr_sum is given; an operand of another type.
      ValueError: shapes or options that do not fit.

    Source: DeepGEMM's function of this name.
    """
    for given in (d, sqr_sum):
        check_not_written("tf32_hc_prenorm_gemm", given, ": (d, sqr_sum)")
    result: tuple[jax.Array, jax.Array] = run(hc_prenorm_gemm, a, b, num_splits=num_splits, **options)
    return result
