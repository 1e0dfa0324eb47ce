"""Dense products: FP8, BF16, and those that XLA gives to cuBLASLt."""

from __future__ import annotations

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
    with_alpha,
)
from jax_deepgemm.ops.gemm import api as gemm
from jax_deepgemm.ops.gemm import heads
from jax_deepgemm.ops.quantize import PreparedFp4
from jax_deepgemm.ops.quantize.array import QuantizedLike

__all__ = [
    "bf16_gemm_nn",
    "bf16_gemm_nt",
    "bf16_gemm_tn",
    "bf16_gemm_tt",
    "fp8_fp4_gemm_nn",
    "fp8_fp4_gemm_nt",
    "fp8_fp4_gemm_tn",
    "fp8_fp4_gemm_tt",
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_nt_skip_head_mid",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
]


def fp8_fp4_gemm_nt(
    a: QuantizedLike,
    b: QuantizedLike | PreparedFp4,
    d: None = None,
    c: ArrayLike | None = None,
    recipe: Recipe = None,
    recipe_a: Half = None,
    recipe_b: Half = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    **options: Any,
) -> jax.Array:
    """D = C + A @ B.T of FP8 operands: `jax_deepgemm.fp8_gemm_nt` as DeepGEMM's users call it.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> x, w = jnp.ones((4, 256), jnp.bfloat16), jnp.ones((576, 256), jnp.bfloat16)
    >>> a, b = deep_gemm.utils.per_token_cast_to_fp8(x), deep_gemm.utils.per_block_cast_to_fp8(w)
    >>> deep_gemm.fp8_gemm_nt(a, b).shape
    (4, 576)
    >>> deep_gemm.fp8_gemm_nt(a, b, c=jnp.ones((4, 576)), recipe=(1, 128, 128)).dtype.name
    'float32'

    Args:
      a: (values [m, k], scales [m, ceil(k / 128)]), or a QuantizedArray. Scales are float32, or int32 words
        of four UE8M0 codes, [m, ceil(k / 512)].
      b: (values [n, k], scales [ceil(n / 128), ceil(k / 128)] or [n, ceil(k / 128)]), or a QuantizedArray.
        Or FP4, without C: (int8 [n, k / 2], scales [n, ceil(k / 32)] or [n, ceil(k / 128)], powers of two or
        words of their codes), n a multiple of 64, which is brought into the order of the kernels at each
        call; a `PreparedFp4` (`jax_deepgemm.prepare_fp4`) is in it already.
      d: None: the value is returned.
      c: [m, n], bfloat16 or float32, added; the result has its type unless out_dtype says another.
      recipe: (rows of a, rows of b, elements of k) that share a scale, (1, 128, 128), (1, 1, 128), (1, 32,
        32) or (1, 1, 32); None: the shapes tell.
      recipe_a, recipe_b: the same for each operand: (rows, elements of k).
      compiled_dims: letters of "mnk"; changes nothing.
      disable_ue8m0_cast: changes nothing: scales are never rounded here.
      options: alpha, a factor of the product; keyword arguments of `jax_deepgemm.fp8_gemm_nt` (out_dtype,
        epilogue, config, ..); settings of `jax_deepgemm.config` for this call (num_sms, ..).

    Returns:
      [m, n] in bfloat16, or in out_dtype.

    Raises:
      TypeError: d is given, an operand is not quantised.
      ValueError: shapes, types or recipes that do not fit each other; a recipe that no kernel has.
      NotImplementedError: an a of packed FP4.

    Source: DeepGEMM's function of this name. On Hopper it takes C only in float32 and with scales per row,
    and gives bfloat16 only without C; here every pair works.
    """
    more = (recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast)
    return _fp8("nt", a, b, d, c, more, options)


def fp8_fp4_gemm_nn(
    a: QuantizedLike,
    b: QuantizedLike,
    d: None = None,
    c: ArrayLike | None = None,
    recipe: Recipe = None,
    recipe_a: Half = None,
    recipe_b: Half = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    **options: Any,
) -> jax.Array:
    """D = C + A @ B of FP8 operands, b stored [k, n]: `jax_deepgemm.fp8_gemm_nn`.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> x, w = jnp.ones((4, 256), jnp.bfloat16), jnp.ones((256, 576), jnp.bfloat16)
    >>> a, b = deep_gemm.utils.per_token_cast_to_fp8(x), deep_gemm.utils.per_block_cast_to_fp8(w)
    >>> deep_gemm.fp8_gemm_nn(a, b).shape
    (4, 576)

    Args:
      a: (values [m, k], scales [m, ceil(k / 128)]), or a QuantizedArray.
      b: (values [k, n], scales [ceil(k / 128), ceil(n / 128)] or [ceil(k / 128), n]), or a QuantizedArray.
      d, c, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast, options: as in `fp8_fp4_gemm_nt`.

    Returns:
      [m, n] in bfloat16, or in out_dtype.

    Raises:
      TypeError, ValueError, NotImplementedError: as `fp8_fp4_gemm_nt`.

    Source: DeepGEMM's function of this name, which needs compute capability 10 for it.
    """
    more = (recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast)
    return _fp8("nn", a, b, d, c, more, options)


def fp8_fp4_gemm_tn(
    a: QuantizedLike,
    b: QuantizedLike,
    d: None = None,
    c: ArrayLike | None = None,
    recipe: Recipe = None,
    recipe_a: Half = None,
    recipe_b: Half = None,
    compiled_dims: str = "mn",
    disable_ue8m0_cast: bool = False,
    **options: Any,
) -> jax.Array:
    """D = C + A.T @ B of FP8 operands, stored [k, m] and [k, n]: `jax_deepgemm.fp8_gemm_tn`.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> x, w = jnp.ones((256, 4), jnp.bfloat16), jnp.ones((256, 576), jnp.bfloat16)
    >>> a, b = deep_gemm.utils.per_channel_cast_to_fp8(x), deep_gemm.utils.per_channel_cast_to_fp8(w)
    >>> deep_gemm.fp8_gemm_tn(a, b).shape
    (4, 576)

    Args:
      a: (values [k, m], scales [ceil(k / 128), m]), or a QuantizedArray.
      b: (values [k, n], scales [ceil(k / 128), ceil(n / 128)] or [ceil(k / 128), n]), or a QuantizedArray.
      d, c, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast, options: as in `fp8_fp4_gemm_nt`.

    Returns:
      [m, n] in bfloat16, or in out_dtype.

    Raises:
      TypeError, ValueError, NotImplementedError: as `fp8_fp4_gemm_nt`.

    Source: DeepGEMM's function of this name, which needs compute capability 10 for it.
    """
    more = (recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast)
    return _fp8("tn", a, b, d, c, more, options)


def fp8_fp4_gemm_tt(
    a: QuantizedLike,
    b: QuantizedLike,
    d: None = None,
    c: ArrayLike | None = None,
    recipe: Recipe = None,
    recipe_a: Half = None,
    recipe_b: Half = None,
    compiled_dims: str = "mn",
    disable_ue8m0_cast: bool = False,
    **options: Any,
) -> jax.Array:
    """D = C + A.T @ B.T of FP8 operands, a stored [k, m]: `jax_deepgemm.fp8_gemm_tt`.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> x, w = jnp.ones((256, 4), jnp.bfloat16), jnp.ones((576, 256), jnp.bfloat16)
    >>> a, b = deep_gemm.utils.per_channel_cast_to_fp8(x), deep_gemm.utils.per_block_cast_to_fp8(w)
    >>> deep_gemm.fp8_gemm_tt(a, b).shape
    (4, 576)

    Args:
      a: (values [k, m], scales [ceil(k / 128), m]), or a QuantizedArray.
      b: (values [n, k], scales [ceil(n / 128), ceil(k / 128)] or [n, ceil(k / 128)]), or a QuantizedArray.
      d, c, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast, options: as in `fp8_fp4_gemm_nt`.

    Returns:
      [m, n] in bfloat16, or in out_dtype.

    Raises:
      TypeError, ValueError, NotImplementedError: as `fp8_fp4_gemm_nt`.

    Source: DeepGEMM's function of this name, which needs compute capability 10 for it.
    """
    more = (recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast)
    return _fp8("tt", a, b, d, c, more, options)


fp8_gemm_nt, fp8_gemm_nn = fp8_fp4_gemm_nt, fp8_fp4_gemm_nn
fp8_gemm_tn, fp8_gemm_tt = fp8_fp4_gemm_tn, fp8_fp4_gemm_tt


def fp8_gemm_nt_skip_head_mid(
    a: QuantizedLike,
    b: QuantizedLike,
    d: ArrayLike | None = None,
    head_splits: tuple[int, int, int] | None = None,
    recipe: Recipe = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    **options: Any,
) -> jax.Array:
    """A @ B.T with a hole in the columns of each head: `jax_deepgemm.fp8_gemm_nt_skip_head_mid`.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> a = jnp.ones((4, 128), jnp.float8_e4m3fn), jnp.ones((4, 1))
    >>> b = jnp.ones((256, 128), jnp.float8_e4m3fn), jnp.ones((2, 1))
    >>> d = deep_gemm.fp8_gemm_nt_skip_head_mid(a, b, head_splits=(64, 64, 64))
    >>> d[0, ::64].tolist()
    [128.0, 0.0, 128.0, 128.0, 0.0, 128.0]

    Args:
      a: (values [m, k], scales [m, ceil(k / 128)]), or a QuantizedArray.
      b: (values [n, k], scales [ceil(n / 128), ceil(k / 128)] or [n, ceil(k / 128)]), or a QuantizedArray.
      d: [m, n + n / (left + right) * mid], whose holes the result keeps; it is not written to, but its memory
        becomes the result's if it is donated or not used again. None: holes are zeros.
      head_splits: (left, mid, right): columns of each head before, in and behind its hole.
      recipe, compiled_dims, disable_ue8m0_cast: as in `fp8_fp4_gemm_nt`.
      options: keyword arguments of `jax_deepgemm.fp8_gemm_nt_skip_head_mid` (out_dtype, config, ..), and
        settings of `jax_deepgemm.config` for this call.

    Returns:
      [m, n + n / (left + right) * mid] in bfloat16, or in out_dtype.

    Raises:
      TypeError: head_splits are not given, an operand is not quantised.
      ValueError: shapes, types, recipes or head_splits that do not fit.

    Source: DeepGEMM's function of this name, of releases before 2.8.
    """
    op = "fp8_gemm_nt_skip_head_mid"
    check_given(op, head_splits=head_splits)
    check_dims(op, compiled_dims)
    block_a, block_b = blocks_of(op, recipe)
    left, right = operand(op, "a", a, block_a), operand(op, "b", b, block_b)
    more = {"head_splits": head_splits} | result_dtype(options, d)
    result: jax.Array = run(heads.fp8_gemm_nt_skip_head_mid, left, right, d, **more)
    return result


def _fp8(
    layout: str, a: Any, b: Any, d: Any, c: Any, more: tuple[Any, ...], options: dict[str, Any]
) -> jax.Array:
    op = f"fp8_gemm_{layout}"
    recipe, recipe_a, recipe_b, compiled_dims, _ = more
    check_not_written(op, d)
    check_dims(op, compiled_dims)
    block_a, block_b = blocks_of(op, recipe, recipe_a, recipe_b)
    left = operand(op, "a", a, block_a, k_last=layout[0] == "n")
    right = operand(op, "b", b, block_b, k_last=layout[1] == "t", weight=layout == "nt")
    result: jax.Array = run(getattr(gemm, op), left, right, c, **with_alpha(result_dtype(options, c)))
    return result


def bf16_gemm_nt(
    a: ArrayLike,
    b: ArrayLike,
    d: None = None,
    c: ArrayLike | None = None,
    compiled_dims: str = "nk",
    **options: Any,
) -> jax.Array:
    """D = C + A @ B.T of bfloat16 operands: `jax_deepgemm.bf16_gemm_nt` as DeepGEMM's users call it.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> x, w = jnp.ones((4, 256), jnp.bfloat16), jnp.ones((576, 256), jnp.bfloat16)
    >>> deep_gemm.bf16_gemm_nt(x, w, c=jnp.ones((4, 576)))[0, :2].tolist()
    [257.0, 257.0]

    Args:
      a: [m, k] bfloat16.
      b: [n, k] bfloat16.
      d: None: the value is returned.
      c: [m, n], bfloat16 or float32, added; the result has its type unless out_dtype says another.
      compiled_dims: letters of "mnk"; changes nothing.
      options: alpha, a factor of the product; keyword arguments of `jax_deepgemm.bf16_gemm_nt` (out_dtype,
        epilogue, config, ..); settings of `jax_deepgemm.config` for this call (num_sms, ..).

    Returns:
      [m, n] in bfloat16, or in out_dtype. C is added before the one rounding; DeepGEMM rounds the product
      first where C is bfloat16.

    Raises:
      TypeError: d is given, an operand is no array.
      ValueError: shapes or types that do not fit each other.

    Source: DeepGEMM's function of this name.
    """
    return _bf16("nt", a, b, d, c, compiled_dims, options)


def bf16_gemm_nn(
    a: ArrayLike,
    b: ArrayLike,
    d: None = None,
    c: ArrayLike | None = None,
    compiled_dims: str = "nk",
    **options: Any,
) -> jax.Array:
    """D = C + A @ B of bfloat16 operands: `jax_deepgemm.bf16_gemm_nn`.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> deep_gemm.bf16_gemm_nn(jnp.ones((4, 256), jnp.bfloat16), jnp.ones((256, 8), jnp.bfloat16)).shape
    (4, 8)

    Args:
      a: [m, k] bfloat16.
      b: [k, n] bfloat16.
      d, c, compiled_dims, options: as in `bf16_gemm_nt`.

    Returns:
      [m, n] in bfloat16, or in out_dtype.

    Raises:
      TypeError, ValueError: as `bf16_gemm_nt`.

    Source: DeepGEMM's function of this name.
    """
    return _bf16("nn", a, b, d, c, compiled_dims, options)


def bf16_gemm_tn(
    a: ArrayLike,
    b: ArrayLike,
    d: None = None,
    c: ArrayLike | None = None,
    compiled_dims: str = "mn",
    **options: Any,
) -> jax.Array:
    """D = C + A.T @ B of bfloat16 operands: `jax_deepgemm.bf16_gemm_tn`.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> deep_gemm.bf16_gemm_tn(jnp.ones((256, 4), jnp.bfloat16), jnp.ones((256, 8), jnp.bfloat16)).shape
    (4, 8)

    Args:
      a: [k, m] bfloat16.
      b: [k, n] bfloat16.
      d, c, compiled_dims, options: as in `bf16_gemm_nt`.

    Returns:
      [m, n] in bfloat16, or in out_dtype.

    Raises:
      TypeError, ValueError: as `bf16_gemm_nt`.

    Source: DeepGEMM's function of this name.
    """
    return _bf16("tn", a, b, d, c, compiled_dims, options)


def bf16_gemm_tt(
    a: ArrayLike,
    b: ArrayLike,
    d: None = None,
    c: ArrayLike | None = None,
    compiled_dims: str = "mn",
    **options: Any,
) -> jax.Array:
    """D = C + A.T @ B.T of bfloat16 operands: `jax_deepgemm.bf16_gemm_tt`.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import deep_gemm
    >>> deep_gemm.bf16_gemm_tt(jnp.ones((256, 4), jnp.bfloat16), jnp.ones((8, 256), jnp.bfloat16)).shape
    (4, 8)

    Args:
      a: [k, m] bfloat16.
      b: [n, k] bfloat16.
      d, c, compiled_dims, options: as in `bf16_gemm_nt`.

    Returns:
      [m, n] in bfloat16, or in out_dtype.

    Raises:
      TypeError, ValueError: as `bf16_gemm_nt`.

    Source: DeepGEMM's function of this name.
    """
    return _bf16("tt", a, b, d, c, compiled_dims, options)


def _bf16(
    layout: str, a: Any, b: Any, d: Any, c: Any, compiled_dims: str, options: dict[str, Any]
) -> jax.Array:
    op = f"bf16_gemm_{layout}"
    check_not_written(op, d)
    check_dims(op, compiled_dims)
    result: jax.Array = run(getattr(gemm, op), a, b, c, **with_alpha(result_dtype(options, c)))
    return result
