"""Reading and writing safetensors files, alone and in shards with an index."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_deepgemm.checkpoint import header, pairs

INDEX = "model.safetensors.index.json"
_E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
_SIX_BITS = (np.dtype(ml_dtypes.float6_e2m3fn), np.dtype(ml_dtypes.float6_e3m2fn))


class Checkpoint(Mapping[str, np.ndarray]):
    """Tensors of a checkpoint by name, as numpy arrays that lie in the mapped file: nothing is read before
    it is used, and what is used can be a slice.

    Files are opened, and their headers checked, when a tensor of theirs is first asked for. Arrays are
    read-only; bfloat16 and FP8 ones have the types of ml_dtypes. Types of four and six bits (`F4`, `F6_E2M3`,
    `F6_E3M2`) come as uint8 [.., bytes of a row], two numbers of F4 in a byte, the lower four bits first.

    Args:
      path: a `.safetensors` file, a `.safetensors.index.json`, or a folder with an index or one file.

    Raises:
      ValueError: an index or a file that breaks the format, with what was found; a folder without either.
      KeyError: a name that the checkpoint has not, with similar ones.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/small.safetensors"
    >>> save_safetensors(path, {"norm.weight": np.ones(4, ml_dtypes.bfloat16)})
    >>> tensors = Checkpoint(path)
    >>> list(tensors), tensors["norm.weight"].dtype, tensors.dtype("norm.weight")
    (['norm.weight'], dtype(bfloat16), 'BF16')
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _found(Path(path))
        self._files: dict[Path, _File] = {}
        if self.path.suffix == ".json":
            self._home = _index(self.path)
        else:
            self._home = dict.fromkeys(self._file(self.path).header.entries, self.path)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._of(name).array(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors)"

    def dtype(self, name: str) -> str:
        """The type of a tensor in the words of the format, as "F8_E4M3"."""
        return self._of(name).header.entries[name].dtype

    def metadata(self, name: str) -> dict[str, str]:
        """What the file that holds a tensor says of itself."""
        return dict(self._of(name).header.metadata)

    def _of(self, name: str) -> _File:
        if name not in self._home:
            close = difflib.get_close_matches(name, self._home, 3)
            raise KeyError(f"{self.path} has no tensor {name!r}; similar: {', '.join(close) or 'none'}.")
        file = self._file(self._home[name])
        if name not in file.header.entries:
            raise ValueError(f"{self.path} says that {file.path.name} holds {name!r}, which it does not.")
        return file

    def _file(self, path: Path) -> _File:
        if path not in self._files:
            self._files[path] = _File(path)
        return self._files[path]


class _File:
    """One mapped file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            length = header.length_of(file.read(header.LENGTH), size, str(path))
            self.header = header.parse(file.read(length), size, str(path))
        self._bytes: np.ndarray = np.memmap(path, np.uint8, "r").view(np.ndarray)

    def array(self, name: str) -> np.ndarray:
        entry = self.header.entries[name]
        dtype, shape = entry.stored
        held = self._bytes[self.header.begin + entry.begin : self.header.begin + entry.end]
        return held.view(dtype).reshape(shape)


def _found(path: Path) -> Path:
    """The file, or the index, that a path means."""
    if not path.is_dir():
        return path
    indices, files = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
    chosen = indices or files
    if len(chosen) != 1:
        names = ", ".join(one.name for one in chosen) or "neither"
        raise ValueError(
            f"{path}: found {names}; need one *.safetensors.index.json, or one *.safetensors. Name the file."
        )
    return chosen[0]


def _index(path: Path) -> dict[str, Path]:
    """Tensor -> the file that holds it, beside the index."""
    try:
        weights = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = set(weights.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of a checkpoint: need {{'weight_map': {{tensor: file}}}}, "
                         f"found {error!r}.") from None  # fmt: skip
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{path} names the file {name!r}, need the name of a file beside it.")
        if not (path.parent / name).is_file():
            raise ValueError(f"{path} names the file {name!r}, which is not beside it. Download it.")
    return {tensor: path.parent / name for tensor, name in weights.items()}


def save_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    dtypes: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors into one safetensors file, in place of what is there when all is written.

    Args:
      path: of the file.
      tensors: arrays by name, of numpy or JAX, [..]. A `QuantizedArray`, `Fp4Array` or `PerChannelArray` goes
        into tensors as `load_quantized` reads them: named "x", `x` and `x_scale_inv` (QuantizedArray), or
        `x_scale` (PerChannelArray), or `x_scale` and `x_scale_2` (NVFP4); `x_blocks` and `x_scales` (MXFP4).
        float4_e2m1fn is packed, two numbers in a byte.
      dtypes: types that arrays of bytes really have, by name: with "F4" uint8 [.., k / 2] is FP4 [.., k].
      metadata: strings that the file says of itself.

    Returns:
      None.

    Raises:
      TypeError, ValueError: a type that the format does not know; arrays that are not wholly in this process;
        a quantised array of other blocks than (128, 128).

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/small.safetensors"
    >>> save_safetensors(path, {"a": np.arange(6).reshape(2, 3)}, metadata={"format": "pt"})
    >>> Checkpoint(path)["a"].tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    _write(Path(path), _described(_plain(tensors), dtypes or {}), dict(metadata or {}))


def save_sharded(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    shard_bytes: int = 5 * 10**9,
    dtypes: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors into files of at most `shard_bytes` and `model.safetensors.index.json`, in a folder.

    Args:
      folder: where files go; it is made.
      tensors: arrays [..] as in `save_safetensors`.
      shard_bytes: number of bytes of tensors in a file; a larger tensor has a file of its own.
      dtypes, metadata: as in `save_safetensors`.

    Returns:
      None.

    Raises:
      TypeError, ValueError: as `save_safetensors`.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> save_sharded(folder, {name: np.ones(8, np.float32) for name in "abc"}, shard_bytes=64)
    >>> sorted(os.listdir(folder))[:2]
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    >>> len(Checkpoint(folder))
    3
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, _Described]] = []
    full = 0
    described = _described(_plain(tensors), dtypes or {})
    for name, one in described.items():
        if not shards or full + one[2].nbytes > shard_bytes:
            shards.append({})
            full = 0
        shards[-1][name] = one
        full += one[2].nbytes
    weights: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write(folder / file, shard, dict(metadata or {}))
        weights |= dict.fromkeys(shard, file)
    total = sum(one[2].nbytes for one in described.values())
    _replace(
        folder / INDEX, [json.dumps({"metadata": {"total_size": total}, "weight_map": weights}).encode()]
    )


_Described = tuple[str, tuple[int, ...], np.ndarray]
"""dtype and shape as the header says them, and bytes."""


def _plain(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Quantised arrays taken apart."""
    found: dict[str, Any] = {}
    for name, value in tensors.items():
        found |= pairs.taken_apart(name, value)
    return found


def _described(tensors: Mapping[str, Any], dtypes: Mapping[str, str]) -> dict[str, _Described]:
    """In the order of the format's library: by type, then by name."""
    unknown = set(dtypes) - set(tensors)
    if unknown:
        raise ValueError(
            f"save_safetensors: dtypes names {sorted(unknown)}, which are not among the tensors."
        )
    found = {name: _one(name, value, dtypes.get(name)) for name, value in tensors.items()}
    return dict(sorted(found.items(), key=lambda item: (-header.RANKS.index(item[1][0]), item[0])))


def _one(name: str, value: Any, dtype: str | None) -> _Described:
    if name == header.METADATA:
        raise ValueError(f"save_safetensors: {name!r} is the format's own, give the tensor another name.")
    if not getattr(value, "is_fully_addressable", True):
        raise ValueError(
            f"save_safetensors: {name!r} has parts on devices of other processes. Gather it: "
            "jax.experimental.multihost_utils.process_allgather(x, tiled=True)."
        )
    array = np.asarray(value)
    array = array if array.dtype.byteorder != ">" else array.astype(array.dtype.newbyteorder("<"))
    if dtype is None and array.dtype == _E2M1:
        array, dtype = _packed(name, array), "F4"
    if dtype is None and array.dtype in header.NAMES:
        return header.NAMES[array.dtype], array.shape, array
    if dtype is None:
        hint = " Pack it and give its type: dtypes=." if array.dtype in _SIX_BITS else ""
        raise TypeError(
            f"save_safetensors: {name!r} is {array.dtype}, which the format does not know.{hint} It knows "
            f"{', '.join(str(kind) for kind in header.NAMES)} and float4_e2m1fn."
        )
    return dtype, _shape_of_bytes(name, array, dtype), array


def _packed(name: str, array: np.ndarray) -> np.ndarray:
    if not array.ndim or array.shape[-1] % 2:
        raise ValueError(
            f"save_safetensors: {name!r} is float4_e2m1fn {list(array.shape)}, need rows of pairs."
        )
    codes = array.view(np.uint8) & 15
    return codes[..., ::2] | codes[..., 1::2] << 4


def _shape_of_bytes(name: str, array: np.ndarray, dtype: str) -> tuple[int, ...]:
    """The shape in numbers of an array of bytes that hold numbers of another type."""
    known = dtype in header.PACKED or (dtype in header.DTYPES and header.bits_of(dtype) == 8)
    bits = header.bits_of(dtype) if known else 0
    if not known or array.dtype.itemsize != 1 or not array.ndim or array.shape[-1] * 8 % bits:
        raise ValueError(
            f"save_safetensors: {name!r} is {array.dtype} {list(array.shape)}, dtypes says {dtype!r}. Need "
            f"an array of bytes [.., bytes of a row] and a type of eight bits or fewer: "
            f"{', '.join(header.PACKED)}."
        )
    return (*array.shape[:-1], array.shape[-1] * 8 // bits)


def _write(path: Path, tensors: Mapping[str, _Described], metadata: dict[str, str]) -> None:
    if not all(isinstance(part, str) for pair in metadata.items() for part in pair):
        raise TypeError(f"save_safetensors: metadata is {metadata!r}, need a map of strings to strings.")
    head = header.encode(((name, dtype, shape) for name, (dtype, shape, _) in tensors.items()), metadata)
    _replace(path, [head, *(array for *_, array in tensors.values())])


def _replace(path: Path, parts: list[Any]) -> None:
    """Writes beside the file first: the mapped bytes of a file that is open stay what they were."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            for part in parts:
                file.write(part if isinstance(part, bytes) else _bytes(part))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
