"""indexer_quantize: checks and calls of the ops."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.ops.indexer_quantize import reference
from jax_deepgemm.ops.indexer_quantize.op import QUANTIZE, TO_ARRAYS, TO_BYTES
from jax_deepgemm.ops.indexer_quantize.problem import DEPTHS, DTYPES, SCALE_BYTES
from jax_deepgemm.ops.quantize import QuantizedArray

Cache: TypeAlias = Any
"""uint8 [pages, page, d + 4] or [pages, page, 1, d + 4]; (values [pages, page, d], scales [pages, page])."""
FORMATS = ("f32", "ue8m0")
_NAME = "indexer_quantize"
_ANYWHERE = {"fallback": "reference"}


def hadamard(x: jax.Array) -> jax.Array:
    """Rows of x times the orthonormal Hadamard matrix: products of two rotated rows are those of the rows.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 2.0, 3.0, 4.0]])
    >>> hadamard(x).tolist(), hadamard(hadamard(x)).tolist()
    ([[5.0, -1.0, -2.0, 0.0]], [[1.0, 2.0, 3.0, 4.0]])

    Args:
      x: [.., d] of a floating dtype, d a power of two.

    Returns:
      [.., d] in the dtype of x, computed in float32. Differentiable.

    Raises:
      ValueError: d is no power of two.
    """
    depth = x.shape[-1] if x.ndim else 0
    if depth < 1 or depth & (depth - 1):
        raise ValueError(
            f"hadamard: x is {list(x.shape)}, need [.., d] with d a power of two: pad it with zeros."
        )
    return reference.hadamard(x).astype(x.dtype)


def indexer_quantize(
    x: jax.Array,
    *,
    rotate: bool = True,
    scale_format: str = "f32",
    cache: Cache | None = None,
    slots: jax.Array | None = None,
) -> Any:
    """An indexer's queries or keys in FP8 with one scale for each row, rotated before, in one pass.

    The rotation, by a Hadamard matrix, spreads what is large in one column over all, so that less is lost in
    FP8; as it is orthonormal, products of rotated rows are those of the rows. The result is that of
    `quantize(hadamard(x in float32))`, bit for bit.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm.indexer import indexer_quantize
    >>> q = jax.random.normal(jax.random.key(0), (4, 8, 128), jnp.bfloat16)
    >>> indexer_quantize(q).scales.shape
    (4, 8, 1)
    >>> k = jax.random.normal(jax.random.key(1), (3, 128), jnp.bfloat16)
    >>> cache = indexer_quantize(k, cache=jnp.zeros((5, 16, 132), jnp.uint8), slots=jnp.array([70, -1, 2]))
    >>> cache.shape, jnp.any(cache != 0, axis=(1, 2)).tolist()
    ((5, 16, 132), [True, False, False, False, True])

    Args:
      x: queries [s, h, d] or keys [n, d], bfloat16, float16 or float32; d is 32, 64 or 128.
      rotate: whether rows are rotated.
      scale_format: "f32": amax / 448; "ue8m0": rounded up to a power of two.
      cache: keys are written here instead: uint8 [pages, page, d + 4] or [pages, page, 1, d + 4], DeepSeek's
        format, in which a page is its values and then its float32 scales; or (values [pages, page, d]
        float8_e4m3fn, scales [pages, page] float32). Donate it, and it is updated in place.
      slots: integer [n], where each key goes: page slot // page, place slot % page. Slots outside of the
        cache, such as -1, skip their key. Slots are distinct: of several keys with one slot, parts of any may
        be written.

    Returns:
      A QuantizedArray, or the new cache, as `cache` was given.

    Raises:
      TypeError, ValueError: dtypes and shapes that do not fit; the message says what to do.

    Has no derivative: train with bf16_mqa_logits. Infinities and NaN make their row NaN.
    """
    x = unwrapped(x)
    _check(x, scale_format, cache, slots)
    form = {"rotate": bool(rotate), "powers": scale_format == "ue8m0", **_ANYWHERE}
    if cache is None:
        rows = x if x.ndim == 3 else x[:, None]
        values, scales = QUANTIZE(rows, **form)
        return QuantizedArray(values.reshape(x.shape), scales.reshape(*x.shape[:-1], 1), (1, 128))
    at = jnp.asarray(unwrapped(slots)).astype(jnp.int32)
    if isinstance(cache, tuple | list):
        return tuple(TO_ARRAYS(*same_varying_axes([x, at, *map(unwrapped, cache)]), **form))
    cache = unwrapped(cache)
    flat = cache.reshape(cache.shape[0], -1)
    [new] = TO_BYTES(*same_varying_axes([x, at, flat]), page=cache.shape[1], **form)
    return new.reshape(cache.shape)


def _check(x: Any, scale_format: Any, cache: Any, slots: Any) -> None:
    if not hasattr(x, "dtype") or np.dtype(x.dtype).name not in DTYPES:
        given = np.dtype(x.dtype).name if hasattr(x, "dtype") else type(x).__name__
        raise TypeError(
            f"{_NAME}: x is {given}, need {', '.join(DTYPES)}. Convert it: x.astype(jnp.bfloat16)."
        )
    if x.ndim not in (2, 3) or x.shape[-1] not in DEPTHS:
        raise ValueError(
            f"{_NAME}: x is {list(x.shape)}, need [s, h, d] or [n, d] with d {', '.join(map(str, DEPTHS))}."
        )
    if scale_format not in FORMATS:
        raise ValueError(f"{_NAME}: scale_format is {scale_format!r}, need 'f32' or 'ue8m0'.")
    if (cache is None) != (slots is None):
        raise ValueError(
            f"{_NAME}: cache and slots go together; got {'slots' if cache is None else 'cache'} alone."
        )
    if cache is not None:
        _check_cache(x, cache, slots)


def _check_cache(x: Any, cache: Any, slots: Any) -> None:
    if x.ndim != 2:
        raise ValueError(
            f"{_NAME}: x is {list(x.shape)}, and keys of a cache are [n, d]. Leave cache out for queries."
        )
    n, depth = x.shape
    at = unwrapped(slots)
    if tuple(np.shape(at)) != (n,) or not jnp.issubdtype(jnp.result_type(at), jnp.integer):
        raise ValueError(
            f"{_NAME}: slots are {jnp.result_type(at)} {list(np.shape(at))}, need integers [{n}], one "
            "of each key."
        )
    types = _types(cache)
    if isinstance(cache, tuple | list):
        wanted = [("float8_e4m3fn", (*types[0][1][:2], depth)), ("float32", tuple(types[0][1][:2]))]
        if types != wanted or len(types[0][1]) != 3:
            raise ValueError(
                f"{_NAME}: cache is {types}, need values float8_e4m3fn [pages, page, {depth}] and scales "
                "float32 [pages, page]."
            )
    else:
        [(dtype, shape)] = types
        if dtype != "uint8" or shape[2:] not in ((depth + SCALE_BYTES,), (1, depth + SCALE_BYTES)):
            raise ValueError(
                f"{_NAME}: cache is {dtype} {list(shape)}, need uint8 [pages, page, {depth + SCALE_BYTES}], "
                "or (values, scales)."
            )


def _types(cache: Any) -> list[tuple[str, tuple[int, ...]]]:
    each = cache if isinstance(cache, tuple | list) else [cache]
    return [(np.dtype(one.dtype).name, tuple(one.shape)) for one in map(unwrapped, each)]
