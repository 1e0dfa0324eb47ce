"""QuantizedArray from and to what others use: (values, scales) tuples and qwix's QArray."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.ops.quantize.array import (
    Block,
    QuantizedArray,
    QuantizedLike,
    check_block,
    scales_shape,
)

EXACT_IN_FLOAT32 = tuple(np.dtype(t) for t in (jnp.bfloat16, jnp.float16, jnp.float8_e8m0fnu))
MX_VALUES = {"mxfp8": jnp.float8_e4m3fn}
"""What qwix calls its own types of array -> the type of the values."""
KNOWN_BLOCKS: tuple[Block, ...] = ((1, 128), (128, 128), (128, 1), (1, 32))


def from_tuple(pair: QuantizedLike, block: Block | None = None) -> QuantizedArray:
    """A QuantizedArray of (values, scales); the arrays are used as they are.

    Args:
      pair: values [.., rows, cols] FP8, scales [.., ceil(rows / block[0]), ceil(cols / block[1])] float32. Or
        a QuantizedArray, which is returned if it has this block.
      block: what the scales were made with. None: the one of (1, 128), (128, 128), (128, 1) and (1, 32) that
        fits the shapes; if several do (small arrays, as one row with (1, 128) or (128, 128)), a ValueError
        asks for it.

    Returns:
      QuantizedArray of the values' shape.

    Raises:
      TypeError: no pair of arrays, values that are not FP8, scales that are not float32.
      ValueError: shapes that fit no block, or several, or another one than `block`.

    >>> from jax_deepgemm.quantization import quantize
    >>> q = quantize(jnp.ones((576, 256)), (128, 128))
    >>> from_tuple((q.values, q.scales)).block
    (128, 128)
    """
    if isinstance(pair, QuantizedArray):
        if block is not None and tuple(block) != tuple(pair.block):
            raise ValueError(
                f"from_tuple: got a QuantizedArray with block {pair.block}, and block={tuple(block)}."
            )
        return pair.check("from_tuple")
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"from_tuple: got {type(pair).__name__}, need a tuple (values, scales).")
    parts: Any = pair
    values, scales = parts
    if block is None:
        block = _only_block(values, scales)
    return QuantizedArray(values, scales, check_block(block, "from_tuple")).check("from_tuple")


def to_tuple(q: QuantizedArray) -> tuple[jax.Array, jax.Array]:
    """(values, scales) of a QuantizedArray, as DeepGEMM's functions and `from_tuple` take them.

    Args:
      q: QuantizedArray with values [.., rows, cols].

    Returns:
      (values, scales): values [.., rows, cols] FP8, scales [.., ceil(rows / block[0]), ceil(cols /
      block[1])] float32. The pair does not say its block: keep q.block where the shapes do not tell.

    Raises:
      TypeError, ValueError: parts that do not fit each other (`QuantizedArray.check`).

    >>> from jax_deepgemm.quantization import quantize
    >>> [part.shape for part in to_tuple(quantize(jnp.ones((2, 256))))]
    [(2, 256), (2, 2)]
    """
    q.check("to_tuple", "q")
    return q.values, q.scales


def from_qwix(array: Any, block: Block | None = None) -> QuantizedArray:
    """A QuantizedArray of a qwix QArray with FP8 values and no zero point.

    Tiles become blocks. A scale for a whole dimension, or for tiles of a multiple of 128, is repeated for
    each 128 of it, so that channelwise and per-tensor arrays can be multiplied; so are scales shared by
    leading dimensions. Scales of bfloat16, float16 or float8_e8m0fnu ("mxfp8") become float32, exactly.

    Args:
      array: qwix.QArray; its values are used as they are.
      block: the block that the scales, as they are, were made with, where the shapes allow several.

    Returns:
      QuantizedArray of the array's shape.

    Raises:
      TypeError, ValueError: another type, a zero point, values that are not FP8, tiled leading dimensions.

    >>> from jax_deepgemm.quantization import quantize
    >>> q = quantize(jnp.ones((4, 256)), (1, 128))
    >>> from_qwix(to_qwix(q)).block
    (1, 128)
    """
    if not is_qwix(array):
        raise TypeError(
            f"from_qwix: got {type(array).__module__}.{type(array).__name__}, need a qwix.QArray."
        )
    if array.zero_point is not None:
        raise ValueError(
            "from_qwix: the array has a zero point; FP8 scales are symmetric. Quantise without one."
        )
    values, scales = array.qvalue, array.scale
    _check_qtype(array.qtype, values.dtype)
    if len(values.shape) < 2 or len(scales.shape) != len(values.shape):
        raise ValueError(
            f"from_qwix: values {list(values.shape)} and scales {list(scales.shape)}; need equal ranks >= 2."
        )
    tile = tuple(1 if n == s else n // max(s, 1) for n, s in zip(values.shape, scales.shape))
    lead = values.shape[:-2]
    if any(t != 1 and s != 1 for t, s in zip(tile[:-2], scales.shape)):
        raise ValueError(
            f"from_qwix: leading dimensions {list(lead)} are tiled by {list(tile[:-2])}; need none."
        )
    if scales.shape[:-2] != lead:
        scales = jnp.broadcast_to(scales, lead + scales.shape[-2:])
    if np.dtype(scales.dtype) in EXACT_IN_FLOAT32:
        scales = scales.astype(jnp.float32)
    if block is not None:
        return QuantizedArray(values, scales, check_block(block, "from_qwix")).check("from_qwix", "array")
    steps = [_step(n, s, t) for n, s, t in zip(values.shape[-2:], scales.shape[-2:], tile[-2:])]
    for axis, step in zip((-2, -1), steps):
        scales = _scales_per_block(scales, axis, values.shape[axis], max(tile[axis], 1), step)
    return QuantizedArray(values, scales, (steps[0], steps[1])).check("from_qwix", "array")


def _check_qtype(qtype: Any, stored: Any) -> None:
    try:
        wanted = np.dtype(MX_VALUES.get(qtype, qtype) if isinstance(qtype, str) else qtype)
    except TypeError:
        wanted = None
    if qtype is not None and wanted != np.dtype(stored):
        raise TypeError(
            f"from_qwix: qtype {qtype if isinstance(qtype, str) else np.dtype(qtype).name} is stored as "
            f"{np.dtype(stored).name}. Quantise with qtype=jnp.float8_e4m3fn."
        )


def _step(size: int, scales: int, tile: int) -> int:
    """Elements per scale along one dimension, after repeating: 128 where the tile is whole blocks of 128."""
    whole = scales == 1 and size > 1
    return 128 if whole or tile % 128 == 0 else max(tile, 1)


def _scales_per_block(scales: Any, axis: int, size: int, tile: int, step: int) -> Any:
    """Scales of tiles along an axis as scales of blocks of `step`, none of which holds an edge of a tile."""
    count = -(-size // step)
    return scales if scales.shape[axis] == count else jnp.take(scales, np.arange(count) * step // tile, axis)


def to_qwix(q: QuantizedArray) -> Any:
    """A qwix.QArray with the values and scales of a QuantizedArray.

    qwix has no ragged tiles: each block must divide its dimension, or hold all of it.

    Args:
      q: QuantizedArray with values [.., rows, cols].

    Returns:
      qwix.QArray: qvalue [.., rows, cols] FP8, scale [.., rows / block[0], cols / block[1]] float32, no zero
      point. `from_qwix` takes it back.

    Raises:
      ImportError: qwix is not installed.
      TypeError, ValueError: ragged blocks, or parts that do not fit each other.

    >>> from jax_deepgemm.quantization import quantize
    >>> q = quantize(jnp.ones((4, 256)), (1, 128))
    >>> to_qwix(q).scale.shape
    (4, 2)
    """
    q.check("to_qwix", "q")
    for n, step, count in zip(q.shape[-2:], q.block, q.scales.shape[-2:]):
        if n % step and count != 1:
            raise ValueError(
                f"to_qwix: block {q.block} leaves a ragged block in {list(q.shape)}, which qwix does not "
                "have. Pad the array to a multiple of the block before quantize."
            )
    try:
        QArray = importlib.import_module("qwix").QArray
    except ImportError as error:
        raise ImportError(
            "to_qwix: needs qwix, which does not import here. Install it: pip install qwix."
        ) from error
    return QArray(qvalue=q.values, scale=q.scales, qtype=q.dtype)


def is_qwix(array: Any) -> bool:
    """Whether this is a qwix QArray; never imports qwix.

    >>> is_qwix(jnp.ones(3))
    False
    """
    kind = type(array)
    return "qwix" in sys.modules and kind.__name__ == "QArray" and kind.__module__.split(".")[0] == "qwix"


def _only_block(values: Any, scales: Any) -> Block:
    if not hasattr(values, "shape") or not hasattr(scales, "shape") or len(values.shape) < 2:
        raise TypeError("from_tuple: need arrays (values, scales) of rank >= 2.")
    fitting = [b for b in KNOWN_BLOCKS if scales_shape(tuple(values.shape), b) == tuple(scales.shape)]
    if len(fitting) == 1:
        return fitting[0]
    problem = f"fit the blocks {', '.join(map(str, fitting))}" if fitting else f"fit none of {KNOWN_BLOCKS}"
    raise ValueError(
        f"from_tuple: values {list(values.shape)} and scales {list(scales.shape)} {problem}. Say which: "
        "from_tuple((values, scales), block=(rows, cols))."
    )
