"""Which scales belong to which weight of a checkpoint, and how the two are stored.

| beside `x.weight` | is | becomes |
|:--|:--|:--|
| `x.weight_scale_inv` | a scale a block of 128x128, DeepSeek-V3's and Qwen3's FP8 | QuantizedArray |
| `x.weight_scale` [n, 1], [1] or [] | a scale a channel or a matrix (compressed-tensors) | PerChannelArray |
| `x.weight_scale`, blocks of 128x128 | the same library's "block" | QuantizedArray |
| `x.weight_scale` and `x.weight_scale_2` | NVFP4 (ModelOpt) | Fp4Array |
| `x.weight_packed` and `x.weight_scale`, no `x.weight` | MXFP4 (compressed-tensors) | Fp4Array |
| the same, `x.weight_global_scale` | NVFP4 (compressed-tensors) | Fp4Array |
| `x.scale` | DeepSeek's own names: blocks of 128x128, or MXFP4 | QuantizedArray, Fp4Array |
| `x_blocks` and `x_scales`, no `x` | MXFP4 (gpt-oss) | Fp4Array |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from jax_deepgemm.quantization import Fp4Array, PerChannelArray, QuantizedArray, scales_shape

E4M3, E5M2, E8M0, E2M1 = (
    np.dtype(getattr(ml_dtypes, f"float{name}")) for name in ("8_e4m3fn", "8_e5m2", "8_e8m0fnu", "4_e2m1fn")
)
_BYTES, _SIGNED = np.dtype(np.uint8), np.dtype(np.int8)
SQUARE = (128, 128)
_MXFP4, _NVFP4 = 32, 16


@dataclass(frozen=True)
class Stored:
    """A weight as it lies in a checkpoint, arrays still in the mapped file.

    kind: "plain", "blocks", "channels" or "fp4". parts: values; scales; and NVFP4's global scale. block: rows
    and columns that share a scale.
    """

    kind: str
    parts: tuple[np.ndarray, ...]
    block: tuple[int, int] = (1, 1)

    @property
    def form(self) -> tuple[Any, ...]:
        """What weights that are stacked or joined have in common."""
        return self.kind, self.block, len(self.parts), self.parts[0].dtype


def find(tensors: Mapping[str, np.ndarray], name: str, block: tuple[int, int]) -> Stored:
    """The weight of a name, with its scales."""
    if name not in tensors and f"{name}_blocks" in tensors:
        return _of_blocks(name, tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
    if name not in tensors and f"{name}_packed" in tensors:
        return _packed(name, tensors)
    values = tensors[name]
    if values.dtype.itemsize > 1 or values.dtype == np.bool_:
        return Stored("plain", (values,))
    if values.ndim < 2 and any(f"{name}{end}" in tensors for end in ("_scale_inv", "_scale", "_scale_2")):
        raise ValueError(
            f"load_quantized: {name} is a vector {list(values.shape)} with scales, need [.., n, k]."
        )
    if f"{name}_scale_inv" in tensors:
        return _square(f"{name}_scale_inv", values, tensors[f"{name}_scale_inv"], block)
    if f"{name}_scale_2" in tensors:
        return _nvfp4(name, values, tensors[f"{name}_scale"], tensors[f"{name}_scale_2"])
    if f"{name}_scale" in tensors:
        if f"{name}_zero_point" in tensors:
            raise ValueError(f"load_quantized: {name} has a zero point, no product here takes one.")
        return _scaled(f"{name}_scale", values, tensors[f"{name}_scale"], block)
    plain = f"{name.removesuffix('weight')}scale"
    if name.endswith(".weight") and plain in tensors:
        scale = tensors[plain]
        fp4 = values.dtype in (_SIGNED, _BYTES)
        return _mxfp4(plain, values, scale) if fp4 else _square(plain, values, scale, block)
    if values.dtype in (E4M3, E5M2):
        raise ValueError(
            f"load_quantized: {name} is {values.dtype}, and no scales are beside it: looked for "
            f"{name}_scale_inv, {name}_scale and {plain}. For the bytes alone: Checkpoint(path)[{name!r}]."
        )
    return Stored("plain", (values,))


def _scaled(name: str, values: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> Stored:
    """`weight_scale` of a matrix, of channels, or of blocks, as its shape says."""
    *lead, n, _ = values.shape
    whole = (scale.shape in ((), (1,)) and not lead) or scale.shape == (*lead, n, 1)
    if not whole and values.ndim >= 2 and scale.shape == scales_shape(values.shape, block):
        return _square(name, values, scale, block)
    if not whole or values.dtype not in (E4M3, _SIGNED):
        _refuse(name, scale, values, f"[{n}, 1], [1] or [], or a scale a block of {block}, of FP8 or int8")
    scales = np.broadcast_to(scale.reshape(()), (n,)) if scale.size == 1 and not lead else scale[..., 0]
    return Stored("channels", (values.swapaxes(-1, -2), scales))


def _square(name: str, values: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> Stored:
    if (
        values.dtype not in (E4M3, E5M2)
        or values.ndim < 2
        or scale.shape != scales_shape(values.shape, block)
    ):
        _refuse(name, scale, values, f"FP8 values and a scale a block of {block}; others: block=")
    return Stored("blocks", (values, scale), block)


def _of_blocks(name: str, blocks: np.ndarray, scales: np.ndarray) -> Stored:
    if blocks.dtype != _BYTES or blocks.ndim < 3 or blocks.shape[-1] != _MXFP4 // 2:
        _refuse(
            f"{name}_scales", scales, blocks, f"bytes [.., n, k / {_MXFP4}, {_MXFP4 // 2}] in {name}_blocks"
        )
    values = blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1])
    return _mxfp4(f"{name}_scales", values, scales)


def _mxfp4(name: str, values: np.ndarray, scales: np.ndarray) -> Stored:
    *lead, half = values.shape
    if scales.dtype not in (_BYTES, E8M0) or scales.shape != (*lead, 2 * half // _MXFP4):
        _refuse(name, scales, values, f"a byte of UE8M0 for {_MXFP4} numbers, two numbers in a byte")
    return Stored("fp4", (values.view(_BYTES), scales.view(E8M0)), (1, _MXFP4))


def _nvfp4(
    name: str, values: np.ndarray, scales: np.ndarray, whole: np.ndarray, end: str = "_scale_2"
) -> Stored:
    *lead, half = values.shape
    fits = scales.dtype == E4M3 and scales.shape == (*lead, 2 * half // _NVFP4)
    if values.dtype != _BYTES or not fits or values.ndim < 2:
        _refuse(f"{name}_scale", scales, values, f"e4m3 for {_NVFP4} numbers, two numbers in a byte")
    if whole.size != np.prod(lead[:-1], dtype=int):
        _refuse(f"{name}{end}", whole, values, "one number for each matrix")
    return Stored("fp4", (values, scales, whole.reshape(lead[:-1])), (1, _NVFP4))


def _packed(name: str, tensors: Mapping[str, np.ndarray]) -> Stored:
    """The library's FP4, whose scales were divided by the global scale when they were made."""
    values, scales = tensors[f"{name}_packed"], tensors[f"{name}_scale"]
    if values.dtype != _BYTES:
        raise ValueError(
            f"load_quantized: {name}_packed is {values.dtype}, need bytes of two FP4 numbers; no product "
            "here takes integers of four bits."
        )
    if f"{name}_global_scale" not in tensors:
        return _mxfp4(f"{name}_scale", values, scales)
    whole = np.float32(1) / tensors[f"{name}_global_scale"].astype(np.float32)
    return _nvfp4(name, values, scales, whole, "_global_scale")


def _refuse(name: str, scale: np.ndarray, values: np.ndarray, need: str) -> NoReturn:
    raise ValueError(
        f"load_quantized: {name} is {scale.dtype} {list(scale.shape)} beside values {values.dtype} "
        f"{list(values.shape)}; need {need}."
    )


def taken_apart(name: str, value: Any) -> dict[str, Any]:
    """Tensors of a quantised array, as `find` reads them; the array itself if it is a plain one."""
    if isinstance(value, QuantizedArray):
        if value.block != SQUARE:
            raise ValueError(
                f"save_safetensors: {name!r} has blocks of {value.block}, checkpoints have {SQUARE}. "
                f"Quantise it so, or write its parts: values and scales."
            )
        return {name: value.values, f"{name}_scale_inv": value.scales}
    if isinstance(value, PerChannelArray):
        values, scales = (np.asarray(part) for part in value)
        return {name: values.swapaxes(-1, -2), f"{name}_scale": scales[..., None]}
    if not isinstance(value, Fp4Array):
        return {name: value}
    values, scales = _bytes(np.asarray(value.values)), np.asarray(value.scales)
    if value.global_scale is not None:
        return {name: values, f"{name}_scale": scales, f"{name}_scale_2": value.global_scale}
    if scales.dtype.itemsize != 1 or scales.shape[-1] * _MXFP4 != 2 * values.shape[-1]:
        raise ValueError(
            f"save_safetensors: {name!r} has scales {scales.dtype} {list(scales.shape)} for numbers "
            f"{list(value.shape)}, need a byte of UE8M0 for {_MXFP4} of them."
        )
    blocks = values.reshape(*scales.shape, _MXFP4 // 2)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales.view(_BYTES)}


def _bytes(values: np.ndarray) -> np.ndarray:
    """Two numbers in a byte, the first in the lower four bits."""
    if values.dtype != E2M1:
        return values.view(_BYTES)
    codes = values.view(_BYTES) & 15
    return codes[..., ::2] | codes[..., 1::2] << 4
