"""Weights of a checkpoint on their devices: each reads its own slice of the mapped file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm.checkpoint import pairs
from jax_deepgemm.checkpoint.files import Checkpoint
from jax_deepgemm.checkpoint.names import Weight
from jax_deepgemm.checkpoint.pairs import Stored
from jax_deepgemm.quantization import Fp4Array, PerChannelArray, QuantizedArray, scales_spec

Placement: TypeAlias = Sharding | Callable[[str, tuple[int, ...]], Sharding | None] | None


def load_quantized(
    path: str | os.PathLike[str] | Checkpoint,
    names: Any,
    sharding: Placement = None,
    *,
    block: tuple[int, int] = pairs.SQUARE,
) -> Any:
    """Weights of a checkpoint as the products of this package take them, bit for bit.

    What a weight becomes depends on what the checkpoint has beside it: with `weight_scale_inv` a
    `QuantizedArray` [n, k]; with `weight_scale` of channels or of the matrix a `PerChannelArray` [k, n]; with
    `weight_scale_2` too, or with `_blocks` and `_scales`, an `Fp4Array` [n, k]; else an array of its own
    type. Scales become float32, exactly; those of FP4 stay. Experts of a `Weight` are stacked in front,
    [e, n, k]; its tensors are joined along n. Where one of them ends inside a block of 128, the result has a
    scale a row, block (1, 128), and the same numbers, as that of `quantization.concatenate`.

    Args:
      path: a file, an index or a folder, as of `Checkpoint`, or one.
      names: a pytree of names of tensors and of `Weight`s, as `hugging_face_names` makes it.
      sharding: where results go: a NamedSharding or SingleDeviceSharding for all; a function of (path in the
        tree, as "layers.3.mlp.w13"; shape of the numbers, as (e, n, k)) that gives one, or None; or None, for
        JAX's default device. It is that of the numbers: scales follow where every cut is at the edge of a
        block.
      block: rows and columns that share a scale of `weight_scale_inv`: `weight_block_size` of a config.json.

    Returns:
      The pytree with arrays instead of names.

    Raises:
      KeyError: a tensor that the checkpoint has not.
      TypeError, ValueError: files that break the format; values and scales that do not fit each other; FP8
        without scales; tensors of one Weight that differ; numbers of 64 bits without JAX's x64.

    Each device's part is read from the mapped file when it is made, and nothing else is.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import quantize
    >>> from jax_deepgemm.checkpoint import Weight, load_quantized, save_safetensors
    >>> path = tempfile.mkdtemp() + "/small.safetensors"
    >>> tensors = {f"experts.{e}.up.weight": quantize(jnp.ones((192, 256)), (128, 128)) for e in range(4)}
    >>> save_safetensors(path, tensors | {"norm.weight": jnp.ones(256, jnp.bfloat16)})
    >>> names = {"norm": "norm.weight", "up": Weight("experts.{}.up.weight", experts=4)}
    >>> loaded = load_quantized(path, names)
    >>> loaded["norm"].dtype, loaded["up"]
    (dtype(bfloat16), QuantizedArray(float8_e4m3fn[4,192,256], scales float32[4,2,2], block=(128, 128)))
    """
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint(path)

    def one(where: Any, weight: Any) -> Any:
        if not isinstance(weight, str | Weight):
            raise TypeError(f"load_quantized: names has {weight!r}, need names of tensors and Weights.")
        weight = Weight(weight) if isinstance(weight, str) else weight
        loading = _gathered(checkpoint, weight, block)
        name = jax.tree_util.keystr(where, simple=True, separator=".")
        given = sharding is None or isinstance(sharding, Sharding)
        place: Any = (lambda *_: sharding) if given else sharding
        return loading.result(place(name, loading.shape))

    return jax.tree_util.tree_map_with_path(one, names)


@dataclass(frozen=True)
class _Piece:
    """An array of a file; or, with `rows`, one whose rows stand for `repeat` each, the last for fewer."""

    array: np.ndarray
    repeat: int = 1
    rows: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.array.shape
        return shape if self.rows is None else (*shape[:-2], self.rows, shape[-1])

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        if self.rows is None:
            return self.array[index]
        *lead, rows, cols = index
        chosen: Any = (*lead, np.arange(rows.start, rows.stop) // self.repeat, cols)
        return self.array[chosen]


def _copy(out: np.ndarray, source: np.ndarray) -> None:
    """Converts, or copies as plain integers: numpy moves types of ml_dtypes one number at a time."""
    if out.dtype == source.dtype:
        out, source = (array.view(f"u{array.dtype.itemsize}") for array in (out, source))
    out[...] = source


@dataclass(frozen=True)
class _Assembly:
    """One array made of many: experts (rows of the grid) stacked in front, pieces joined along an axis."""

    grid: tuple[tuple[_Piece, ...], ...]
    axis: int
    stacked: bool
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.grid[0][0].shape)
        if shape:
            shape[self.axis] = sum(piece.shape[self.axis] for piece in self.grid[0])
        return (len(self.grid), *shape) if self.stacked else tuple(shape)

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of a slice, of which alone the files are read."""
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        out = np.empty([stop - start for start, stop in bounds], self.dtype)
        first, last = bounds[0] if self.stacked else (0, 1)
        for i in range(first, last):
            self._read_one(self.grid[i], out[i - first] if self.stacked else out, bounds[self.stacked :])
        return out

    def _read_one(self, pieces: Sequence[_Piece], out: np.ndarray, bounds: list[tuple[int, int]]) -> None:
        if not bounds:
            _copy(out, pieces[0][()])
            return
        start, stop = bounds[self.axis]
        offset = 0
        for piece in pieces:
            size = piece.shape[self.axis]
            low, high = max(start - offset, 0), min(stop - offset, size)
            if low < high:
                source, target = [slice(*bound) for bound in bounds], [slice(None)] * len(bounds)
                source[self.axis] = slice(low, high)
                target[self.axis] = slice(low + offset - start, high + offset - start)
                _copy(out[tuple(target)], piece[tuple(source)])
            offset += size

    def placed(self, sharding: Sharding | None) -> jax.Array:
        if jax.dtypes.canonicalize_dtype(self.dtype) != self.dtype:
            raise ValueError(
                f"load_quantized: a tensor is {self.dtype} {list(self.shape)}, which JAX holds "
                "with jax.config.update('jax_enable_x64', True) alone. For the numpy array: "
                "Checkpoint(path)[name]."
            )
        if sharding is None:
            return jax.device_put(self.read((slice(None),) * len(self.shape)))
        parts: dict[Any, np.ndarray] = {}  # copies on several devices are read once

        def read(index: Any) -> np.ndarray:
            key = tuple((part.start, part.stop) for part in index)
            return parts[key] if key in parts else parts.setdefault(key, self.read(index))

        return jax.make_array_from_callback(self.shape, sharding, read)


@dataclass(frozen=True)
class _Loading:
    """A weight whose parts are known, and not yet read."""

    kind: str
    parts: tuple[_Assembly, ...]
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        *lead, last = self.parts[0].shape or (1,)
        return (*lead, 2 * last) if self.kind == "fp4" else self.parts[0].shape

    def result(self, sharding: Sharding | None) -> Any:
        shardings = self._shardings(sharding)
        arrays = [part.placed(one) for part, one in zip(self.parts, shardings, strict=True)]
        if self.kind == "blocks":
            return QuantizedArray(arrays[0], arrays[1], self.block)
        kinds: dict[str, Callable[..., Any]] = {"channels": PerChannelArray, "fp4": Fp4Array}
        return kinds[self.kind](*arrays) if self.kind in kinds else arrays[0]

    def _shardings(self, sharding: Sharding | None) -> list[Sharding | None]:
        if sharding is None or isinstance(sharding, SingleDeviceSharding):
            return [sharding] * len(self.parts)
        if not isinstance(sharding, NamedSharding) or len(sharding.spec) > len(self.shape):
            raise ValueError(
                f"load_quantized: sharding is {sharding!r} for numbers {list(self.shape)}, need a "
                "NamedSharding of at most as many dimensions, a SingleDeviceSharding, a function "
                "that gives one, or None."
            )
        named = sharding  # for the type checker
        return [NamedSharding(named.mesh, spec, memory_kind=named.memory_kind) for spec in self._specs(named)]

    def _specs(self, sharding: NamedSharding) -> list[P]:
        shape, spec = self.shape, sharding.spec
        whole = (*spec, *(None,) * (len(shape) - len(spec)))
        if self.kind == "blocks":
            return [spec, scales_spec(spec, shape, self.block, sharding.mesh)]
        if self.kind == "channels":
            return [spec, P(*whole[:-2], whole[-1])]
        if self.kind == "fp4":
            steps = ((1, 2), self.block)
            cut = [scales_spec(spec, shape, step, sharding.mesh) for step in steps]
            values = spec if cut[0] == P(*whole) else cut[0]
            return [values, cut[1], P(*whole[:-2])][: len(self.parts)]
        return [spec]


def _gathered(checkpoint: Checkpoint, weight: Weight, block: tuple[int, int]) -> _Loading:
    """The tensors of a Weight, found and compared."""
    names = weight.tensors()
    grid = [[pairs.find(checkpoint, name, block) for name in row] for row in names]
    first = grid[0][0]
    for row, tensors in zip(names, grid, strict=True):
        for name, one, other in zip(row, tensors, grid[0], strict=True):
            fits = one.form == first.form and one.parts[0].shape == other.parts[0].shape
            if not fits or not _joins(one, first):
                raise ValueError(
                    f"load_quantized: {name} is {_shown(one)}, {names[0][0]} is {_shown(first)}: they do "
                    "not make one array. Load them as two."
                )
    return _loading(grid, weight.experts is not None, first)


def _joins(one: Stored, other: Stored) -> bool:
    axis = _axis(one)
    shapes = [list(each.parts[0].shape) for each in (one, other)]
    if len(shapes[0]) != len(shapes[1]):
        return False
    for shape in shapes:
        if shape:
            del shape[axis]
    return shapes[0] == shapes[1]


def _shown(one: Stored) -> str:
    return f"{one.kind} {one.parts[0].dtype} {list(one.parts[0].shape)}"


def _axis(one: Stored) -> int:
    """Of n."""
    return -1 if one.kind == "channels" or one.parts[0].ndim < 2 else -2


def _loading(grid: list[list[Stored]], stacked: bool, first: Stored) -> _Loading:
    axis, block = _axis(first), first.block
    rows = first.kind == "blocks" and any(
        one.parts[0].shape[-2] % block[0] for row in grid for one in row[:-1]
    )
    if len(first.parts) == 3:
        _check_global_scales(grid)

    def piece(one: Stored, part: int) -> _Piece:
        array = one.parts[part]
        return _Piece(array, block[0], one.parts[0].shape[-2]) if rows and part else _Piece(array)

    def assembly(part: int) -> _Assembly:
        scales = part and first.kind != "fp4"
        dtype = np.dtype(np.float32) if scales or part == 2 else first.parts[part].dtype
        if part == 2:
            return _Assembly(tuple((_Piece(row[0].parts[2]),) for row in grid), -1, stacked, dtype)
        pieces = tuple(tuple(piece(one, part) for one in row) for row in grid)
        return _Assembly(pieces, axis, stacked, dtype)

    parts = tuple(assembly(part) for part in range(len(first.parts)))
    return _Loading(first.kind, parts, (1, block[1]) if rows else block)


def _check_global_scales(grid: list[list[Stored]]) -> None:
    for row in grid:
        found = [one.parts[2] for one in row]
        if not all(np.array_equal(one, found[0], equal_nan=True) for one in found):
            raise ValueError(
                f"load_quantized: joined NVFP4 tensors have global scales {[one.tolist() for one in found]}, "
                "an Fp4Array has one. Load them as two, which moe.prepare_weights((gate, up), w2) joins."
            )
