"""einsum of two operands on the dense kernels: one matrix product, plain or batched, read as it is stored."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.options import Sharding
from jax_deepgemm.ops.einsum import checks
from jax_deepgemm.ops.einsum import op as ops
from jax_deepgemm.ops.gemm.checks import check_addend, check_options
from jax_deepgemm.ops.gemm.config import GemmConfig
from jax_deepgemm.ops.gemm.op import empty_product
from jax_deepgemm.ops.quantize.array import QuantizedLike


def bf16_einsum(
    expr: str,
    a: ArrayLike,
    b: ArrayLike,
    c: ArrayLike | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
) -> jax.Array:
    """D = C + einsum(expr, a, b), one matrix product, with bfloat16 operands and float32 accumulation.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import bf16_einsum
    >>> x = jnp.ones((4, 2, 64), jnp.bfloat16)  # tokens, heads, features
    >>> w = jnp.ones((2, 128, 64), jnp.bfloat16)  # a matrix for each head
    >>> bf16_einsum("bhr,hdr->bhd", x, w).shape
    (4, 2, 128)
    >>> bf16_einsum("bmk,bnk->mn", w, w, jnp.zeros((128, 128)), out_dtype=jnp.float32)[0, :2]
    Array([128., 128.], dtype=float32)
    >>> jax.grad(lambda w: bf16_einsum("bhr,hdr->bhd", x, w).astype(jnp.float32).sum())(w).shape
    (2, 128, 64)

    All heads are one launch, and nothing is transposed: the batch may stand between the rows and the last
    dimension of any operand and of the result.

    Args:
      expr: two operands and the result, as jnp.einsum takes them, every dimension by a letter. Letters are
        of the batch (in all three terms), rows (in a and the result), columns (in b and the result) or summed
        (in a and b). Those of a class stand side by side in one order wherever they are, and none of the
        batch is last. Of a product without a batch, some rows (or columns, or summed letters) may stand apart
        from the others, as b in "bmk,bnk->mn".
      a, b: bfloat16, as the terms of `expr` say, such as [b, h, r] and [h, d, r].
      c: optional, in out_dtype, of the result's shape, such as [b, h, d]; its buffer becomes the result's if
        it is donated or not used again. In float32 it may be added by the memory system, for which subnormal
        numbers are zero.
      out_dtype: bfloat16 or float32; one rounding, to nearest even, after C was added in float32.
      config: a GemmConfig to use instead of the cost model's choice.
      out_sharding: the result's sharding on a mesh with Explicit axes; needed there if a summed dimension is
        cut.
      reduce_dtype: what partial results are summed in across devices that cut a summed dimension: float32, or
        bfloat16 for half the bytes and one more rounding per device.
      num_sms: at most so many SMs of the GPU, so that others stay free, for collectives say; None:
        `config.num_sms`.

    Returns:
      The result in out_dtype; an empty sum gives C, or zeros.

    Raises:
      ValueError: an einsum that is not one matrix product (the message says why; jnp.einsum computes it),
        shapes or dtypes that do not fit.
      TypeError: an operand that is not an array, an option of the wrong kind.

    Differentiable by jax.grad, jax.jvp, jax.linearize and their compositions; the derivatives are einsums of
    the same kind. The cotangent of a float32 result is rounded to bfloat16 before it is multiplied.
    Deterministic, also where the sum is divided among SMs: equal inputs give equal bits on one device
    kind. On CUDA, an operand whose last dimension is not a multiple of 8 is copied into padded rows, and a
    note is logged. Source: DeepGEMM's `einsum`, which has three of these strings.
    """
    op = "bf16_einsum"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    form, exchanged = checks.form_of(op, expr)
    first, second = checks.check_bf16(op, form, exchanged, a, b)
    sizes = checks.sizes_of(op, expr, form, exchanged, first, second)
    addend = check_addend(op, c, tuple(sizes[name] for name in form.d), options.out_dtype)
    if 0 in sizes.values():
        return empty_product(checks.text(form), first, second, options) if addend is None else addend
    return ops.bf16_einsum(form, first, second, addend, **vars(options))


def fp8_einsum(
    expr: str,
    a: QuantizedLike,
    b: QuantizedLike,
    c: ArrayLike | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
) -> jax.Array:
    """D = C + einsum(expr, a, b), one matrix product, with block-scaled FP8 operands.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import fp8_einsum, quantize
    >>> x = jax.random.normal(jax.random.key(0), (4, 2, 512), jnp.bfloat16)
    >>> w = jax.random.normal(jax.random.key(1), (2, 256, 512), jnp.bfloat16)
    >>> fp8_einsum("bhr,hdr->bhd", quantize(x, (1, 128)), quantize(w, (128, 128))).shape
    (4, 2, 256)

    All heads are one launch, and nothing is transposed, as in `bf16_einsum`. FP8 tensor cores read along the
    summed dimension, so there is one summed letter, the last one of both operands: a weight gradient is
    "hdb,hrb->hdr" of operands that are quantised so.

    Args:
      expr: as in `bf16_einsum`, with one summed letter, the last of both operands.
      a: QuantizedArray of block (1, 128), or (values, scales): values float8_e4m3fn or float8_e5m2, scales
        float32 of the same shape but ceil(k / 128) for the last dimension k.
      b: the same, or of block (128, 128) if the dimension in front of k is all of the result's columns:
        scales [.., ceil(n / 128), ceil(k / 128)]. Of a bare tuple, the scales' shape tells which.
      c, out_dtype, config, out_sharding, reduce_dtype, num_sms: as in `bf16_einsum`.

    If the result's last letter is one of a's, a and b exchange what is said of them.

    Returns:
      The result in out_dtype; an empty sum gives C, or zeros.

    Raises:
      ValueError: an einsum that is not one matrix product, or that would need a transposed operand (the
        message says why, and the way out), shapes, dtypes or scale blocks that do not fit.
      TypeError: an operand that is not quantised, an option of the wrong kind.
      NotImplementedError: on differentiation; `bf16_einsum` has gradients.

    Deterministic: equal inputs give equal bits on one device kind. On CUDA, k is padded with zeros to rows of
    whole 16 bytes where needed, which copies the operand and logs a note. Source: DeepGEMM's function of this
    name; the recipe of scales is that of `fp8_gemm_nt`.
    """
    op = "fp8_einsum"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    form, exchanged = checks.form_of(op, expr)
    checks.check_k_last(op, expr, form, exchanged)
    first, second = checks.check_fp8(op, form, exchanged, a, b)
    sizes = checks.sizes_of(op, expr, form, exchanged, first.values, second.values)
    addend = check_addend(op, c, tuple(sizes[name] for name in form.d), options.out_dtype)
    if 0 in sizes.values():
        values: tuple[Any, Any] = (first.values, second.values)
        return empty_product(checks.text(form), *values, options) if addend is None else addend
    return ops.fp8_einsum(form, first, second, addend, options)
