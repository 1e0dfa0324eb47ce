"""A GEMM whose columns are heads with a hole in each, as latent attention's projection of keys and values
has them: the hole is where the rotary part of the key goes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.options import Sharding
from jax_deepgemm.log import note_once
from jax_deepgemm.ops.gemm import checks, finished, op
from jax_deepgemm.ops.gemm.config import GemmConfig
from jax_deepgemm.ops.gemm.finish import Finish, Heads
from jax_deepgemm.ops.quantize.array import QuantizedLike

STEP = 64
"""Kernels place so many neighbouring columns at once."""


def fp8_gemm_nt_skip_head_mid(
    a: QuantizedLike,
    b: QuantizedLike,
    d: ArrayLike | None = None,
    *,
    head_splits: tuple[int, int, int],
    out_dtype: DTypeLike = jnp.bfloat16,
    config: GemmConfig | None = None,
    out_sharding: Sharding = None,
    num_sms: int | None = None,
) -> jax.Array:
    """A @ B.T with a hole of `mid` columns in each head of `left` + `right` columns.

    Column j of the product is column j + (j + right) // (left + right) * mid of the result: `left` columns
    of a head, its hole, `right` columns of it. Nothing is copied: the product is stored where it belongs.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import fp8_gemm_nt, fp8_gemm_nt_skip_head_mid, quantize
    >>> x = jax.random.normal(jax.random.key(0), (4, 256), jnp.bfloat16)
    >>> w = jax.random.normal(jax.random.key(1), (2 * (128 + 64), 256), jnp.bfloat16)
    >>> a, b = quantize(x), quantize(w, (128, 128))
    >>> k_pe = jnp.ones((4, 64), jnp.bfloat16)
    >>> d = jnp.tile(jnp.zeros((4, 256), jnp.bfloat16).at[:, 128:192].set(k_pe), 2)
    >>> kv = fp8_gemm_nt_skip_head_mid(a, b, d, head_splits=(128, 64, 64))
    >>> kv.shape, bool((kv.reshape(4, 2, 256)[:, :, 128:192] == 1).all())
    ((4, 512), True)
    >>> bool((kv.reshape(4, 2, 256)[:, :, :128] == fp8_gemm_nt(a, b).reshape(4, 2, 192)[:, :, :128]).all())
    True

    Args:
      a: QuantizedArray of block (1, 128), or (values, scales), [m, k], as in `fp8_gemm_nt`.
      b: the same, [n, k], of block (128, 128) or (1, 128); n is a multiple of left + right.
      d: [m, n + n / (left + right) * mid] in out_dtype, whose memory the result takes over if it is donated
        or not used again: its holes stay as they are, its other columns do not matter. None: holes are zeros,
        which the kernel writes with its own columns.
      head_splits: (left, mid, right), static: columns of each head before, in and behind its hole. Of
        multiples of 64 there is a kernel; others are joined in a second pass, and a note is logged.
      out_dtype: bfloat16 or float32.
      config: a GemmConfig to use instead of the cost model's choice.
      out_sharding: the result's sharding on a mesh with Explicit axes.
      num_sms: as in `fp8_gemm_nt`.

    Returns:
      [m, n + n / (left + right) * mid] in out_dtype; outside its holes the numbers of `fp8_gemm_nt`, bit for
      bit if both run with one configuration.

    Raises:
      ValueError: shapes, dtypes, scale blocks or head_splits that do not fit.
      TypeError: an operand that is not quantised, an option of the wrong kind.
      NotImplementedError: on differentiation.

    Deterministic. On a mesh rows may be cut; k, and columns of the result, are whole on each device before
    they are cut. Source: DeepGEMM's function of this name, which leaves holes undefined.
    """
    where = "fp8_gemm_nt_skip_head_mid"
    options = checks.check_options(where, out_dtype, jnp.float32, out_sharding, config, num_sms)
    left, right, (m, n, k) = checks.check_fp8(where, "nt", a, b)
    heads = _heads(where, head_splits, n)
    held = _held(where, d, m, heads.width(n), options.out_dtype)
    if 0 in (m, n, k):
        product = op.empty_product("mk,nk->mn", left.values, right.values, options)
        return finished.spread(product, heads, held) if m else jnp.zeros((0, heads.width(n)), product.dtype)
    if heads.mid == 0:
        return op.fp8_gemm(left, right, None, options)
    if any(size % STEP for size in heads) or not (heads.left and heads.right):
        note_once(
            f"{where}: head_splits={tuple(heads)} are joined in a second pass over the result; the kernel "
            f"takes multiples of {STEP}, left and right not 0."
        )
        return finished.spread(op.fp8_gemm(left, right, None, options), heads, held)
    rest, last = ([], "") if held is None else ([held], "d")
    return finished.fp8_gemm(left, right, rest, last, Finish(heads=heads, fill=held is None), options)


def _heads(where: str, given: Any, n: int) -> Heads:
    numbers = isinstance(given, tuple | list) and len(given) == 3
    if not numbers or not all(isinstance(x, int | np.integer) and not isinstance(x, bool) for x in given):
        raise TypeError(f"{where}: head_splits is {given!r}, need three ints, (left, mid, right).")
    heads = Heads(*map(int, given))
    if min(heads) < 0 or heads.taken == 0 or n % heads.taken:
        raise ValueError(
            f"{where}: head_splits is {tuple(heads)} and b has {n} rows, need left + right, {heads.taken}, "
            "to be positive and to divide them: the columns of a head of the product."
        )
    return heads


def _held(where: str, d: Any, m: int, width: int, dtype: Any) -> jax.Array | None:
    d = unwrapped(d)
    if d is None:
        return None
    if not checks.is_array(d) or tuple(d.shape) != (m, width) or np.dtype(d.dtype) != dtype:
        given = checks.describe(d) if checks.is_array(d) else repr(d)
        raise ValueError(
            f"{where}: d is {given}, need {dtype.name} [{m}, {width}], the result's shape and dtype, or None "
            "for holes of zeros."
        )
    return jnp.asarray(d)
