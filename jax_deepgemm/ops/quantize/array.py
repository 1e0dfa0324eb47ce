"""QuantizedArray: FP8 values with one scale per block, as one pytree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

Block = tuple[int, int]

FP8_MAX: dict[np.dtype, float] = {np.dtype(jnp.float8_e4m3fn): 448.0, np.dtype(jnp.float8_e5m2): 57344.0}
"""The FP8 types an operand may have, with their largest finite value."""


_NO_TRANSPOSE = (
    "QuantizedArray.T: a transposed FP8 operand is a copy, so nothing does it silently. Use the GEMM whose "
    "letters name the stored layout (for b stored [k, n]: fp8_gemm_nn), or make the copy: "
    "QuantizedArray(q.values.mT, q.scales.mT, q.block[::-1])."
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedArray:
    """FP8 values and the float32 scale of each of their blocks: element = stored value * scale of its block.

    Args:
      values: [.., rows, cols] float8_e4m3fn or float8_e5m2.
      scales: [.., ceil(rows / block[0]), ceil(cols / block[1])] float32, row-major. The last block may be
        ragged.
      block: (rows, cols) of a block, static: it is part of the pytree's structure.

    It goes through ``jit``, ``vmap``, ``scan``, ``shard_map``, ``jax.tree.map`` (also with leaves that are no
    arrays, as PartitionSpecs or None) and checkpoints like a pair of arrays. What JAX puts together from
    leaves is therefore not checked; what the constructor is given is, in its last two dimensions (leading
    ones may be those of a vmap), and every function of this package calls `check`.

    To join arrays use `concatenate` of this package: joining the leaves by ``jax.tree.map`` is wrong where a
    block does not end at the seam, and no shape may show it.

    Raises:
      ValueError: FP8 values and scales whose shapes do not fit each other with this block.

    FP8 leaves count as floating point in ``jax.grad``: keep quantised weights out of the differentiated
    arguments, and the master weights in bfloat16 or float32.

    >>> from jax_deepgemm.quantization import dequantize, quantize
    >>> q = quantize(jnp.ones((4, 256), jnp.bfloat16))
    >>> q
    QuantizedArray(float8_e4m3fn[4,256], scales float32[4,2], block=(1, 128))
    >>> q.shape, q.scales.shape
    ((4, 256), (4, 2))
    >>> dequantize(q)[0, :2].tolist()
    [1.0, 1.0]
    """

    values: jax.Array
    scales: jax.Array
    block: Block = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        if isinstance(self.block, list):  # static fields are hashed
            object.__setattr__(self, "block", tuple(self.block))
        if _is_shaped(self.values) and _is_shaped(self.scales) and np.dtype(self.values.dtype) in FP8_MAX:
            check_block(self.block, "QuantizedArray")
            if min(len(self.values.shape), len(self.scales.shape)) >= 2:
                _check_shapes(self, "QuantizedArray", "operand", whole=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        """Rank of the values."""
        return len(self.values.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.values.shape)

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored values."""
        return np.dtype(self.values.dtype)

    def with_values(self, values: jax.Array) -> QuantizedArray:
        """The same scales and block with other values, checked."""
        return QuantizedArray(values, self.scales, self.block).check("with_values")

    def with_scales(self, scales: jax.Array) -> QuantizedArray:
        """The same values and block with other scales, checked."""
        return QuantizedArray(self.values, scales, self.block).check("with_scales")

    def check(self, where: str = "QuantizedArray", name: str = "operand") -> QuantizedArray:
        """Returns itself if types and shapes fit each other, else raises a TypeError or ValueError.

        Args:
          where: the function to name in the message.
          name: the argument to name in the message.

        Raises:
          TypeError: values that are no FP8 array, scales that are no float32 array.
          ValueError: shapes that do not fit each other with this block.
        """
        _check(self, where, name)
        return self

    def shardings(self, values: NamedSharding) -> QuantizedArray:
        """Shardings of values and scales, a pytree of this structure for ``in_shardings`` or ``device_put``.

        Scales are cut along with the values where every cut is at the edge of a block, else replicated.

        >>> from jax.sharding import Mesh
        >>> from jax_deepgemm.quantization import quantize
        >>> mesh = Mesh(jax.devices()[:1], ("x",))
        >>> q = quantize(jnp.ones((256, 128)), (128, 128))
        >>> placed = jax.device_put(q, q.shardings(NamedSharding(mesh, P("x", None))))
        >>> placed.scales.sharding.spec == P("x", None)
        True
        """
        spec = scales_spec(values.spec, self.shape, self.block, values.mesh)
        return _unflatten(self.block, (values, NamedSharding(values.mesh, spec)))

    def __getitem__(self, index: Any) -> QuantizedArray:
        """Indexes the leading (batch, expert) dimensions; blocks span the rows and columns.

        >>> from jax_deepgemm.quantization import quantize
        >>> q = quantize(jnp.ones((3, 4, 256)))
        >>> q[1].shape, q[:2].scales.shape
        ((4, 256), (2, 4, 2))
        """
        parts = index if isinstance(index, tuple) else (index,)
        used = sum(part is not None for part in parts)
        whole = any(part is Ellipsis or isinstance(part, bool) or _is_mask(part) for part in parts)
        if whole or used > self.ndim - 2:
            raise IndexError(
                f"QuantizedArray: index {index!r} of a {_show(self.values)} with block {self.block}: only "
                f"the {max(self.ndim - 2, 0)} leading dimensions can be indexed (no Ellipsis, no masks). For "
                "rows or columns slice before quantize, or index .values and .scales and build a new "
                "QuantizedArray."
            )
        return QuantizedArray(self.values[index], self.scales[index], self.block)

    def __repr__(self) -> str:
        return f"QuantizedArray({_show(self.values)}, scales {_show(self.scales)}, block={self.block})"

    @property
    def T(self) -> NoReturn:
        """Refused: FP8 layouts are not transposed for free."""
        raise AttributeError(_NO_TRANSPOSE)

    @property
    def mT(self) -> NoReturn:
        """Refused, as `T`."""
        raise AttributeError(_NO_TRANSPOSE)

    def astype(self, dtype: Any) -> NoReturn:
        """Refused: changing the type drops the scales. Use `dequantize`."""
        raise TypeError(
            f"QuantizedArray.astype({np.dtype(dtype).name}): the values mean nothing without their scales. "
            "Use dequantize(q, dtype) for numbers, quantize(dequantize(q), dtype=...) for another FP8 type, "
            "or q.scales.astype and q.with_scales for the scales."
        )

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("QuantizedArray is not an array: use dequantize(q), q.values or q.scales.")

    def __jax_array__(self) -> NoReturn:
        raise TypeError(
            "QuantizedArray is not an array: use dequantize(q), q.values or q.scales; for products "
            "fp8_gemm_nt(a, b)."
        )

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "QuantizedArray is not iterable: use to_tuple(q) for (values, scales), or index it: q[i]."
        )


QuantizedLike: TypeAlias = QuantizedArray | tuple[ArrayLike, ArrayLike]
"""A quantised operand, as products take it: a `QuantizedArray`, or (values, scales), values [.., rows, cols]
FP8 and scales [.., ceil(rows / block[0]), ceil(cols / block[1])] float32, whose shapes tell the block."""


def _flatten_with_keys(q: QuantizedArray) -> tuple[tuple[tuple[Any, Any], ...], Block]:
    key = jax.tree_util.GetAttrKey
    return ((key("values"), q.values), (key("scales"), q.scales)), q.block


def _flatten(q: QuantizedArray) -> tuple[tuple[Any, Any], Block]:
    return (q.values, q.scales), q.block


def _unflatten(block: Block, leaves: Iterable[Any]) -> QuantizedArray:
    """Unchecked: JAX makes trees of placeholders, and of pieces that mean nothing alone."""
    q = object.__new__(QuantizedArray)
    for name, value in zip(("values", "scales", "block"), (*leaves, block), strict=True):
        object.__setattr__(q, name, value)
    return q


jax.tree_util.register_pytree_with_keys(QuantizedArray, _flatten_with_keys, _unflatten, _flatten)


def scales_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """The shape of the scales that belong to values of a shape: one scale per block.

    Args:
      shape: (.., rows, cols) of the values, at least two dimensions.
      block: (rows, cols) of a block; the last blocks may be ragged.

    Returns:
      (.., ceil(rows / block[0]), ceil(cols / block[1])).

    Raises:
      IndexError: fewer than two dimensions.

    >>> scales_shape((4, 576, 7168), (128, 128))
    (4, 5, 56)
    """
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def scales_spec(spec: P, shape: tuple[int, ...], block: Block, mesh: Any) -> P:
    """The PartitionSpec of the scales whose values have a shape and are cut by `spec` on `mesh`.

    A dimension of the scales follows the values where every cut is at the edge of a block, and is whole
    elsewhere.

    Args:
      spec: PartitionSpec of the values.
      shape: shape of the values.
      block: (rows, cols) of a block.
      mesh: a Mesh, an AbstractMesh or a mapping from axis name to size.

    Returns:
      A PartitionSpec with an entry for each dimension.

    Raises:
      KeyError: an axis that the mesh has not.
      ValueError: a spec of more dimensions than the shape has.

    >>> scales_spec(P("x", "y"), (576, 1024), (128, 128), {"x": 4, "y": 2}) == P(None, "y")
    True
    >>> scales_spec(P("x", "y"), (576, 1024), (1, 128), {"x": 4, "y": 2}) == P("x", "y")
    True
    """
    sizes: Mapping[str, int] = mesh if isinstance(mesh, Mapping) else mesh.shape
    entries = (*spec, *(None,) * (len(shape) - len(spec)))
    steps = (1,) * (len(shape) - 2) + tuple(block)
    return P(*(_follow(e, n, step, sizes) for e, n, step in zip(entries, shape, steps, strict=True)))


def _follow(entry: Any, size: int, step: int, sizes: Mapping[str, int]) -> Any:
    names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    parts = math.prod(sizes[name] for name in names)
    return entry if step == 1 or (size % parts == 0 and size // parts % step == 0) else None


def check_block(block: Any, where: str) -> Block:
    """The block as a pair of Python ints, or a ValueError."""
    pair = tuple(block) if isinstance(block, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(b, (int, np.integer)) and b >= 1 for b in pair):
        raise ValueError(
            f"{where}: block is {block!r}, need two positive integers (rows, cols), as (1, 128) for "
            "activations or (128, 128) for weights."
        )
    return int(pair[0]), int(pair[1])


def as_dtype(where: str, name: str, value: Any, need: str) -> np.dtype:
    """What names a dtype, as one; NumPy's own error says nothing of the argument.

    >>> as_dtype("quantize", "dtype", jnp.float8_e5m2, "float8_e5m2").name
    'float8_e5m2'
    """
    if value is None:  # np.dtype(None) is float64
        raise TypeError(f"{where}: {name} is None, need {need}.")
    try:
        return np.dtype(value)
    except TypeError:
        raise TypeError(f"{where}: {name} is {value!r}, which is no dtype; need {need}.") from None


def _check(q: QuantizedArray, where: str, name: str) -> None:
    check_block(q.block, where)
    for part, leaf in (("values", q.values), ("scales", q.scales)):
        if not _is_shaped(leaf):
            raise TypeError(
                f"{where}: {part} of {name} are a {type(leaf).__name__}, need a JAX or NumPy array."
            )
    if np.dtype(q.values.dtype) not in FP8_MAX:
        known = " or ".join(dtype.name for dtype in FP8_MAX)
        raise TypeError(
            f"{where}: values of {name} are {np.dtype(q.values.dtype).name}, need {known}. Make them with "
            "quantize(x)."
        )
    if np.dtype(q.scales.dtype) != np.float32:
        raise TypeError(
            f"{where}: scales of {name} are {np.dtype(q.scales.dtype).name}, need float32. {_way_out(q)}"
        )
    _check_shapes(q, where, name)


def _is_shaped(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _check_shapes(q: QuantizedArray, where: str, name: str, whole: bool = True) -> None:
    """One scale per block; not `whole`: of the last two dimensions."""
    if len(q.values.shape) < 2:
        raise ValueError(
            f"{where}: values of {name} are {_show(q.values)}, need rank >= 2. For a vector use "
            "values[None], scales[None]."
        )
    want = scales_shape(q.shape, q.block)
    if tuple(q.scales.shape) != want and (whole or tuple(q.scales.shape[-2:]) != want[-2:]):
        raise ValueError(
            f"{where}: scales of {name} are {list(q.scales.shape)} for values {list(q.shape)} with block "
            f"{q.block}, need {list(want)}: one scale per block, ceil(rows / {q.block[0]}) x ceil(cols / "
            f"{q.block[1]}). Pass the block that the scales were made with, or make both with quantize(x, "
            "block)."
        )


def _way_out(q: QuantizedArray) -> str:
    if np.dtype(q.scales.dtype) == np.int32:
        return "Packed UE8M0 words become float32 with unpack_ue8m0_from_int(scales)."
    if np.dtype(q.scales.dtype).name == "float8_e8m0fnu" or jnp.issubdtype(q.scales.dtype, jnp.floating):
        return "Convert them: q.with_scales(q.scales.astype(jnp.float32))."
    return "Scales are factors, value = stored * scale."


def _is_mask(part: Any) -> bool:
    return getattr(part, "dtype", None) is not None and np.dtype(part.dtype) == np.dtype(bool)


def _show(leaf: Any) -> str:
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if shape is None or dtype is None:
        text = repr(leaf)
        return text if len(text) <= 40 else f"<{type(leaf).__name__}>"
    return f"{np.dtype(dtype).name}[{','.join(map(str, shape))}]"
