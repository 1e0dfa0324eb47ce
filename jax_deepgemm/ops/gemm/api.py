"""Dense GEMMs: D = C + A @ B, with FP8 or BF16 operands, in four layouts.

The two letters say how A and B are stored: A is [m, k] ("n") or [k, m] ("t"), B is [k, n] ("n") or [n, k]
("t"). "nt" is the native form of the FP8 tensor cores: both operands have k as their last dimension.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.options import Sharding
from jax_deepgemm.log import note_once
from jax_deepgemm.ops.gemm import checks, finished
from jax_deepgemm.ops.gemm import op as ops
from jax_deepgemm.ops.gemm.config import GemmConfig
from jax_deepgemm.ops.gemm.epilogue import Checked, Epilogue, check_epilogue, no_epilogue
from jax_deepgemm.ops.gemm.finish import Finish
from jax_deepgemm.ops.quantize.array import QuantizedArray, QuantizedLike
from jax_deepgemm.ops.quantize.prepared_fp4 import PreparedFp4, products


def fp8_gemm_nt(
    a: QuantizedLike,
    b: QuantizedLike | PreparedFp4,
    c: ArrayLike | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """D = C + A @ B.T with block-scaled FP8 operands.

    d[i, j] = c[i, j] + sum_kb sa[i, kb] * sb[j // 128, kb] * sum_{l in kb} a[i, l] * b[j, l]

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import fp8_gemm_nt, quantize
    >>> x = jax.random.normal(jax.random.key(0), (4, 256), jnp.bfloat16)
    >>> w = jax.random.normal(jax.random.key(1), (576, 256), jnp.bfloat16)
    >>> y = fp8_gemm_nt(quantize(x, (1, 128)), quantize(w, (128, 128)))
    >>> y.shape, y.dtype.name
    ((4, 576), 'bfloat16')

    Leading batch dimensions come by `jax.vmap`; an operand that is not mapped is shared, not copied:

    >>> xs = jax.random.normal(jax.random.key(2), (3, 4, 256), jnp.bfloat16)
    >>> batched = jax.vmap(fp8_gemm_nt, in_axes=(0, None))
    >>> batched(quantize(xs, (1, 128)), quantize(w, (128, 128))).shape
    (3, 4, 576)

    Args:
      a: QuantizedArray of block (1, 128), or (values, scales): values [m, k] float8_e4m3fn or float8_e5m2,
        scales [m, ceil(k / 128)] float32; the number meant is stored * scale.
      b: values [n, k] float8_e4m3fn or float8_e5m2 (A and B may differ), and scales [ceil(n / 128), ceil(k /
        128)] (block (128, 128)) or [n, ceil(k / 128)] (block (1, 128)). Of a bare tuple, the scales' shape
        tells which. Or scales for 32 of k: A of block (1, 32), B of (32, 32) or (1, 32), as MXFP8 has it.
        Or an FP4 weight, a `PreparedFp4` (`prepare_fp4`), then without C, and A in float8_e4m3fn.
      c: optional [m, n] in out_dtype; its buffer becomes the result's if it is donated or not used again.
        In float32 it may be added by the memory system, for which subnormal numbers are zero.
      out_dtype: bfloat16 or float32; one rounding, to nearest even, after float32 accumulation.
      config: a GemmConfig to use instead of the cost model's choice.
      out_sharding: the result's sharding on a mesh with Explicit axes; needed there if k is cut.
      reduce_dtype: what partial results are summed in across devices that cut k: float32, or bfloat16 for
        half the bytes and one more rounding per device.
      num_sms: at most so many SMs of the GPU, so that others stay free, for collectives say; None:
        `config.num_sms`.
      epilogue: an `Epilogue`: alpha, bias and an activation, applied to the float32 sums before C is added;
        with its `out_scales` the result is a QuantizedArray.

    Returns:
      [m, n] in out_dtype. Any m, n, k >= 0: an empty k gives C, or zeros.

    Raises:
      ValueError: shapes, dtypes or scale blocks that do not fit; the message names both sides.
      TypeError: an operand that is not quantised, an option of the wrong kind.
      NotImplementedError: on differentiation; `fp8_linear` is the layer that has gradients.

    Every row and column of the result is defined. Deterministic: equal inputs give equal bits on one device
    kind. On CUDA, k is padded with zeros to rows of whole 16 bytes where needed, which copies the operand and
    logs a note. Source: DeepGEMM's function of this name; the recipe of scales is that of the DeepSeek-V3
    technical report, section 3.3.
    """
    return _fp8_gemm("nt", a, b, c, epilogue, out_dtype, reduce_dtype, out_sharding, config, num_sms)


def fp8_gemm_nn(
    a: QuantizedLike,
    b: QuantizedLike,
    c: ArrayLike | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """D = C + A @ B with block-scaled FP8 operands; B is stored [k, n].

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import fp8_gemm_nn, quantize
    >>> dy = jax.random.normal(jax.random.key(0), (4, 576), jnp.bfloat16)
    >>> w = jax.random.normal(jax.random.key(1), (576, 256), jnp.bfloat16)
    >>> fp8_gemm_nn(quantize(dy, (1, 128)), quantize(w, (128, 128))).shape
    (4, 256)

    The tensor cores read FP8 operands along k only, so B's bytes are transposed in front of the kernel at
    each call (a note is logged once per shape). For a weight that is used often, store it [n, k] and call
    `fp8_gemm_nt`.

    Args:
      a: values [m, k], scales [m, ceil(k / 128)]: block (1, 128).
      b: values [k, n], scales [ceil(k / 128), ceil(n / 128)] (block (128, 128)) or [ceil(k / 128), n] (block
        (128, 1)).
      c: optional [m, n] in out_dtype, as in `fp8_gemm_nt`.
      out_dtype, config, out_sharding, reduce_dtype, num_sms, epilogue: as in `fp8_gemm_nt`.

    Returns:
      [m, n] in out_dtype; an empty k gives C, or zeros.

    Raises:
      ValueError, TypeError, NotImplementedError: as `fp8_gemm_nt`.

    Deterministic, as `fp8_gemm_nt`. Source: DeepGEMM's function of this name.
    """
    return _fp8_gemm("nn", a, b, c, epilogue, out_dtype, reduce_dtype, out_sharding, config, num_sms)


def fp8_gemm_tn(
    a: QuantizedLike,
    b: QuantizedLike,
    c: ArrayLike | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """D = C + A.T @ B with block-scaled FP8 operands; A is stored [k, m] and B [k, n].

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import fp8_gemm_tn, quantize
    >>> dy = jax.random.normal(jax.random.key(0), (256, 8), jnp.bfloat16)
    >>> x = jax.random.normal(jax.random.key(1), (256, 16), jnp.bfloat16)
    >>> fp8_gemm_tn(quantize(dy, (128, 1)), quantize(x, (128, 1)), out_dtype=jnp.float32).shape
    (8, 16)

    Both operands are transposed in front of the kernel (1 byte per element; a note is logged once per shape):
    quantise the transposed matrices and call `fp8_gemm_nt` where that pass matters.

    Args:
      a: values [k, m], scales [ceil(k / 128), m]: block (128, 1).
      b: values [k, n], scales [ceil(k / 128), ceil(n / 128)] (block (128, 128)) or [ceil(k / 128), n] (block
        (128, 1)).
      c: optional [m, n] in out_dtype, as in `fp8_gemm_nt`.
      out_dtype, config, out_sharding, reduce_dtype, num_sms, epilogue: as in `fp8_gemm_nt`.

    Returns:
      [m, n] in out_dtype; an empty k gives C, or zeros.

    Raises:
      ValueError, TypeError, NotImplementedError: as `fp8_gemm_nt`.

    Deterministic, as `fp8_gemm_nt`. Source: DeepGEMM's function of this name.
    """
    return _fp8_gemm("tn", a, b, c, epilogue, out_dtype, reduce_dtype, out_sharding, config, num_sms)


def fp8_gemm_tt(
    a: QuantizedLike,
    b: QuantizedLike,
    c: ArrayLike | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """D = C + A.T @ B.T with block-scaled FP8 operands; A is stored [k, m] and B [n, k].

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import fp8_gemm_tt, quantize
    >>> a = jax.random.normal(jax.random.key(0), (256, 8), jnp.bfloat16)
    >>> b = jax.random.normal(jax.random.key(1), (16, 256), jnp.bfloat16)
    >>> fp8_gemm_tt(quantize(a, (128, 1)), quantize(b, (128, 128))).shape
    (8, 16)

    A is transposed in front of the kernel (1 byte per element; a note is logged once per shape).

    Args:
      a: values [k, m], scales [ceil(k / 128), m]: block (128, 1).
      b: values [n, k], scales [ceil(n / 128), ceil(k / 128)] or [n, ceil(k / 128)], as in `fp8_gemm_nt`.
      c: optional [m, n] in out_dtype, as in `fp8_gemm_nt`.
      out_dtype, config, out_sharding, reduce_dtype, num_sms, epilogue: as in `fp8_gemm_nt`.

    Returns:
      [m, n] in out_dtype; an empty k gives C, or zeros.

    Raises:
      ValueError, TypeError, NotImplementedError: as `fp8_gemm_nt`.

    Deterministic, as `fp8_gemm_nt`. Source: DeepGEMM's function of this name.
    """
    return _fp8_gemm("tt", a, b, c, epilogue, out_dtype, reduce_dtype, out_sharding, config, num_sms)


def bf16_gemm_nt(
    a: ArrayLike,
    b: ArrayLike | PreparedFp4,
    c: ArrayLike | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """D = C + A @ B.T with bfloat16 operands and float32 accumulation.

    d[i, j] = c[i, j] + sum_l a[i, l] * b[j, l]

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import bf16_gemm_nt
    >>> x, w = jnp.ones((4, 256), jnp.bfloat16), jnp.ones((576, 256), jnp.bfloat16)
    >>> bf16_gemm_nt(x, w, out_dtype=jnp.float32)[0, :3]
    Array([256., 256., 256.], dtype=float32)
    >>> jax.grad(lambda w: bf16_gemm_nt(x, w).astype(jnp.float32).sum())(w).shape
    (576, 256)

    Args:
      a: [m, k] bfloat16.
      b: [n, k] bfloat16, or an FP4 weight, a `PreparedFp4`, then without C.
      c: optional [m, n] in out_dtype; its buffer becomes the result's if it is donated or not used again.
        In float32 it may be added by the memory system, for which subnormal numbers are zero.
      out_dtype: bfloat16 or float32; one rounding, to nearest even, after C was added in float32.
      config: a GemmConfig to use instead of the cost model's choice.
      out_sharding: the result's sharding on a mesh with Explicit axes; needed there if k is cut.
      reduce_dtype: what partial results are summed in across devices that cut k: float32, or bfloat16 for
        half the bytes and one more rounding per device.
      num_sms: at most so many SMs of the GPU, so that others stay free, for collectives say; None:
        `config.num_sms`.
      epilogue: an `Epilogue`: alpha, bias and an activation, applied to the float32 sums before C is added;
        with its `out_scales` the result is a QuantizedArray.

    Returns:
      [m, n] in out_dtype. Any m, n, k >= 0: an empty k gives C, or zeros.

    Raises:
      ValueError: shapes or dtypes that do not fit; nothing is promoted.
      TypeError: an operand that is not an array, an option of the wrong kind.

    Differentiable by jax.grad, jax.jvp, jax.linearize and their compositions; the derivatives are GEMMs of
    the other layouts, so nothing is transposed. The cotangent of a float32 result is rounded to bfloat16
    before it is multiplied. Deterministic: equal inputs give equal bits on one device kind. On CUDA, an
    operand whose rows are not whole 16 bytes is copied into padded rows, and a note is logged. Source:
    DeepGEMM's function of this name.
    """
    return _bf16_gemm("nt", a, b, c, epilogue, out_dtype, reduce_dtype, out_sharding, config, num_sms)


def bf16_gemm_nn(
    a: ArrayLike,
    b: ArrayLike,
    c: ArrayLike | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """D = C + A @ B with bfloat16 operands and float32 accumulation; B is stored [k, n].

    d[i, j] = c[i, j] + sum_l a[i, l] * b[l, j]. The kernel reads B as it is stored; nothing is transposed.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import bf16_gemm_nn
    >>> a, b = jnp.ones((2, 16), jnp.bfloat16), jnp.ones((16, 3), jnp.bfloat16)
    >>> bf16_gemm_nn(a, b, jnp.ones((2, 3), jnp.float32), out_dtype=jnp.float32)
    Array([[17., 17., 17.],
           [17., 17., 17.]], dtype=float32)

    Args:
      a: [m, k] bfloat16.
      b: [k, n] bfloat16.
      c: optional [m, n] in out_dtype, as in `bf16_gemm_nt`.
      out_dtype, config, out_sharding, reduce_dtype, num_sms, epilogue: as in `bf16_gemm_nt`.

    Returns:
      [m, n] in out_dtype; an empty k gives C, or zeros.

    Raises:
      ValueError, TypeError: as `bf16_gemm_nt`.

    Differentiable and deterministic, as `bf16_gemm_nt`. Source: DeepGEMM's function of this name.
    """
    return _bf16_gemm("nn", a, b, c, epilogue, out_dtype, reduce_dtype, out_sharding, config, num_sms)


def bf16_gemm_tn(
    a: ArrayLike,
    b: ArrayLike,
    c: ArrayLike | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """D = C + A.T @ B with bfloat16 operands and float32 accumulation; A is stored [k, m] and B [k, n].

    d[i, j] = c[i, j] + sum_l a[l, i] * b[l, j], the form of a weight gradient, dw = dy.T @ x. The kernel
    reads both operands as they are stored; nothing is transposed.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import bf16_gemm_tn
    >>> a, b = jnp.ones((16, 2), jnp.bfloat16), jnp.ones((16, 3), jnp.bfloat16)
    >>> bf16_gemm_tn(a, b, out_dtype=jnp.float32).shape
    (2, 3)

    Args:
      a: [k, m] bfloat16.
      b: [k, n] bfloat16.
      c: optional [m, n] in out_dtype, as in `bf16_gemm_nt`.
      out_dtype, config, out_sharding, reduce_dtype, num_sms, epilogue: as in `bf16_gemm_nt`.

    Returns:
      [m, n] in out_dtype; an empty k gives C, or zeros.

    Raises:
      ValueError, TypeError: as `bf16_gemm_nt`.

    Differentiable and deterministic, as `bf16_gemm_nt`. Source: DeepGEMM's function of this name.
    """
    return _bf16_gemm("tn", a, b, c, epilogue, out_dtype, reduce_dtype, out_sharding, config, num_sms)


def bf16_gemm_tt(
    a: ArrayLike,
    b: ArrayLike,
    c: ArrayLike | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    reduce_dtype: DTypeLike = jnp.float32,
    num_sms: int | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """D = C + A.T @ B.T with bfloat16 operands and float32 accumulation; A is stored [k, m] and B [n, k].

    d[i, j] = c[i, j] + sum_l a[l, i] * b[j, l]. The kernel reads A as it is stored; nothing is transposed.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import bf16_gemm_tt
    >>> a, b = jnp.ones((16, 2), jnp.bfloat16), jnp.ones((3, 16), jnp.bfloat16)
    >>> bf16_gemm_tt(a, b, out_dtype=jnp.float32).shape
    (2, 3)

    Args:
      a: [k, m] bfloat16.
      b: [n, k] bfloat16.
      c: optional [m, n] in out_dtype, as in `bf16_gemm_nt`.
      out_dtype, config, out_sharding, reduce_dtype, num_sms, epilogue: as in `bf16_gemm_nt`.

    Returns:
      [m, n] in out_dtype; an empty k gives C, or zeros.

    Raises:
      ValueError, TypeError: as `bf16_gemm_nt`.

    Differentiable and deterministic, as `bf16_gemm_nt`. Source: DeepGEMM's function of this name.
    """
    return _bf16_gemm("tt", a, b, c, epilogue, out_dtype, reduce_dtype, out_sharding, config, num_sms)


def _k_last(op: str, name: str, x: checks.Quantized, k_first: bool) -> checks.Quantized:
    """The operand with k as its last dimension."""
    if not k_first:
        return x
    note_once(
        f"{op}: {name} {list(x.values.shape)} is stored with k first; FP8 tensor cores read along k, so its "
        "bytes are transposed at each call. Store it with k last and use fp8_gemm_nt to avoid the pass."
    )
    return checks.Quantized(jnp.swapaxes(x.values, 0, 1), jnp.swapaxes(x.scales, 0, 1), x.block)


def _fp4_gemm(op: str, a: Any, b: PreparedFp4, c: Any, epilogue: Any, options: checks.Options) -> jax.Array:
    no_epilogue(op, epilogue)
    return products().dense(op, a, b, c, options)


def _fp8_gemm(layout: str, a: Any, b: Any, c: Any, epilogue: Any, *options: Any) -> jax.Array:
    op, b = f"fp8_gemm_{layout}", unwrapped(b)
    checked = checks.check_options(op, *options, b=b)
    if layout == "nt" and isinstance(b, PreparedFp4):
        return _fp4_gemm(op, a, b, c, epilogue, checked)
    left, right, (m, n, k) = checks.check_fp8(op, layout, a, b)
    addend = checks.check_c(op, c, m, n, checked.out_dtype)
    more = None if epilogue is None else check_epilogue(op, epilogue, n, addend)
    side_a, side_b = checks.sides(layout)
    if 0 in (m, n, k):
        a, b = (x.values.T if side.k_first else x.values for x, side in ((left, side_a), (right, side_b)))
        return _empty(a, b, addend, more, checked)
    left, right = _k_last(op, "a", left, side_a.k_first), _k_last(op, "b", right, side_b.k_first)
    if more is None:
        return ops.fp8_gemm(left, right, addend, checked)
    return more.run(functools.partial(finished.fp8_gemm, left, right), addend, checked)


def _bf16_gemm(layout: str, a: Any, b: Any, c: Any, epilogue: Any, *options: Any) -> jax.Array:
    op, b = f"bf16_gemm_{layout}", unwrapped(b)
    checked = checks.check_options(op, *options, b=b)
    if layout == "nt" and isinstance(b, PreparedFp4):
        return _fp4_gemm(op, a, b, c, epilogue, checked)
    left, right, (m, n, k) = checks.check_bf16(op, layout, a, b)
    addend = checks.check_c(op, c, m, n, checked.out_dtype)
    more = None if epilogue is None else check_epilogue(op, epilogue, n, addend)
    if 0 in (m, n, k):
        side_a, side_b = checks.sides(layout)
        left, right = (x.T if side.k_first else x for x, side in ((left, side_a), (right, side_b)))
        return _empty(left, right, addend, more, checked)
    if more is None:
        return ops.bf16_gemm(layout, left, right, addend, checked)
    return more.run(functools.partial(finished.bf16_gemm, layout, left, right), addend, checked)


def _empty(a: jax.Array, b: jax.Array, c: jax.Array | None, more: Checked | None, options: Any) -> jax.Array:
    """The result if m, n or k is 0."""
    if more is None:
        return ops.empty_product("mk,nk->mn", a, b, options) if c is None else c
    sums = ops.empty_product("mk,nk->mn", a, b, dataclasses.replace(options, out_dtype=checks.FLOAT32))

    def plain(rest: list[jax.Array], last: str, finish: Finish, options: checks.Options) -> Any:
        results = finished.stored(finished.finished(sums, finish, *rest), finish, options.out_dtype)
        return QuantizedArray(results[0], results[1], checks.PER_ROW) if finish.quantized else results[0]

    return more.run(plain, c, options)
