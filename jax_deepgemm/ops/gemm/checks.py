"""What a dense GEMM accepts: every rule about dtypes, shapes and scale blocks, checked while tracing.

Each error says what was given, the rule, and the way out. Nothing here changes a dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.options import config_option, num_sms_option, sharding_option
from jax_deepgemm.ops.gemm.config import GemmConfig
from jax_deepgemm.ops.gemm.reference import FINE_BLOCK, SCALE_BLOCK
from jax_deepgemm.ops.quantize import Fp4Array, PreparedFp4, QuantizedArray
from jax_deepgemm.ops.quantize.array import as_dtype
from jax_deepgemm.ops.quantize.fp4 import nvfp4_parts, parts_of
from jax_deepgemm.ops.quantize.interop import is_qwix
from jax_deepgemm.ops.quantize.per_channel import is_per_channel
from jax_deepgemm.ops.quantize.prepared_fp4 import NO_FP8, products

FP8_DTYPES = tuple(np.dtype(d) for d in (jnp.float8_e4m3fn, jnp.float8_e5m2))
BFLOAT16, FLOAT32 = np.dtype(jnp.bfloat16), np.dtype(np.float32)
OUT_DTYPES = (BFLOAT16, FLOAT32)
LAYOUTS = ("nt", "nn", "tn", "tt")

BLOCKED = (SCALE_BLOCK, SCALE_BLOCK)
PER_ROW = (1, SCALE_BLOCK)
B_BLOCKS = (BLOCKED, PER_ROW, (FINE_BLOCK, FINE_BLOCK), (1, FINE_BLOCK))
"""What may share a scale of B, rows and k, in products whose A has a scale per row and as many of k."""
WEIGHT_GRADIENTS = ("1x128", "128x128")


@dataclass(frozen=True)
class Side:
    """One operand of a GEMM in one layout: its name, the letter of its rows, and how it is stored."""

    name: str
    rows: str
    k_first: bool
    blocks: tuple[tuple[int, int], ...]
    lead: tuple[str, ...] = ()
    """Letters of dimensions in front: the groups of a grouped GEMM."""

    @property
    def dims(self) -> str:
        return f"[{', '.join((*self.lead, *(('k', self.rows) if self.k_first else (self.rows, 'k'))))}]"

    def stored(self, block: tuple[int, int]) -> tuple[int, int]:
        """A block of (rows, k), in the order in which this operand is stored."""
        return (block[1], block[0]) if self.k_first else block

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(rows, k) of a stored shape."""
        return (shape[-1], shape[-2]) if self.k_first else (shape[-2], shape[-1])


def sides(layout: str) -> tuple[Side, Side]:
    """A and B of a layout; A's scales run along k, B's may also cover 128 rows."""
    return (
        Side("a", "m", layout[0] == "t", (PER_ROW,)),
        Side("b", "n", layout[1] == "n", (BLOCKED, PER_ROW)),
    )


def with_fine_blocks(sides: tuple[Side, Side]) -> tuple[Side, Side]:
    """The same, where a scale may also be for 32 of k."""
    a, b = sides
    return replace(a, blocks=(PER_ROW, (1, FINE_BLOCK))), replace(b, blocks=B_BLOCKS)


@dataclass(frozen=True)
class Quantized:
    """A checked FP8 operand, still as stored."""

    values: jax.Array
    scales: jax.Array
    block: tuple[int, int]
    """(rows, k) under one scale, whatever the storage order."""


@dataclass(frozen=True)
class Options:
    """The checked keyword arguments of a GEMM."""

    out_dtype: np.dtype[Any]
    reduce_dtype: np.dtype[Any]
    out_sharding: PartitionSpec | None
    config: GemmConfig | None
    num_sms: int | None


def describe(x: Any) -> str:
    if isinstance(x, QuantizedArray):
        return f"a QuantizedArray of {describe(x.values)}"
    if isinstance(x, Fp4Array):
        return f"an Fp4Array {list(x.shape)}"
    if isinstance(x, PreparedFp4):
        return f"a {x!r}"
    if is_qwix(x):
        return f"a qwix QArray of {describe(x.qvalue)}"
    if isinstance(x, (tuple, list)):
        return f"a {type(x).__name__} of {len(x)}"
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{np.dtype(x.dtype).name} {list(x.shape)}"
    return f"a {type(x).__name__}"


def is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


def raise_type_error(op: str, name: str, given: Any, rule: str, way_out: str) -> NoReturn:
    raise TypeError(f"{op}: {name} is {describe(given)}, need {rule}. {way_out}")


def pieces(op: str, side: Side, x: Any) -> tuple[Any, Any, tuple[int, int] | None]:
    """(values, scales, stored block or None) of a QuantizedArray or a tuple."""
    x = unwrapped(x)
    if isinstance(x, QuantizedArray):
        return unwrapped(x.values), unwrapped(x.scales), tuple(x.block)  # type: ignore[return-value]
    if isinstance(x, PreparedFp4) or _is_fp4(x):
        need = "a QuantizedArray or a (values, scales) tuple of FP8"
        raise_type_error(op, side.name, x, need, _from_fp4(op, side, x))
    if isinstance(x, (tuple, list)) and len(x) == 2:
        values, scales = map(unwrapped, x)
        for part, array in (("values", values), ("scales", scales)):
            if not is_array(array):
                raise_type_error(op, f"{part} of {side.name}", array, "an array", "Pass jax or numpy arrays.")
        return values, scales, None
    way_out = (
        f"Quantise it: jax_deepgemm.quantize({side.name}, {side.stored(side.blocks[0])}); unquantised "
        f"bfloat16 operands go to {op.replace('fp8', 'bf16')}."
    )
    if is_qwix(x):
        way_out = _from_qwix(side.name)
    raise_type_error(op, side.name, x, "a QuantizedArray or a (values, scales) tuple", way_out)


def _fp4_products(kind: str) -> str:
    """What takes a `PreparedFp4`, as b."""
    grouped = f"m_grouped_{kind}_gemm_nt_contiguous and m_grouped_{kind}_gemm_nt_masked"
    return f"{kind}_gemm_nt, {grouped}"


def _is_fp4(x: Any) -> bool:
    """Whether an operand is values and scales of FP4."""
    parts = parts_of(x)
    mxfp4 = parts is not None and getattr(parts[1], "dtype", None) == np.dtype(jnp.float8_e8m0fnu)
    return mxfp4 or isinstance(x, Fp4Array)


def _from_fp4(op: str, side: Side, x: Any) -> str:
    name, kind = side.name, "bf16" if "bf16" in op else "fp8"
    prepared, nvfp4 = isinstance(x, PreparedFp4), nvfp4_parts(x) is not None
    if kind == "fp8" and (x.is_nvfp4 if prepared else nvfp4):
        return f"{NO_FP8} Prepare it, and use {_fp4_products('bf16')}, as b."
    if kind == "fp8" and name == "a":
        return f"Quantise a to FP8: jax_deepgemm.quantize(a, {side.stored(side.blocks[0])})."
    if prepared or name == "a" or ("gemm" in op and op not in _fp4_products(kind)):
        numbers = f"{name}.fp4()" if prepared else name
        instead = (
            f"FP8: jax_deepgemm.quantization.expand_fp4({name})"
            if kind == "fp8"
            else f"bfloat16: jax_deepgemm.quantization.dequantize_fp4({numbers}, jnp.bfloat16)"
        )
        return (
            f"Prepared FP4 weights are taken by {_fp4_products(kind)}, as b stored [.., n, k]. Elsewhere use "
            f"{instead}."
        )
    return f"Prepare it once for the kernels: jax_deepgemm.prepare_fp4({name})."


def _from_qwix(name: str) -> str:
    return f"Convert it: jax_deepgemm.quantization.from_qwix({name})."


def layer_weight(op: str, side: Side, w: Any) -> Any:
    """The weight of a layer: a master weight as it is, a (values, scales) tuple as a QuantizedArray."""
    w = unwrapped(w)
    if is_qwix(w):
        need = "a bfloat16 or float32 array, or a QuantizedArray for a frozen weight"
        raise_type_error(op, side.name, w, need, _from_qwix(side.name))
    if not isinstance(w, (tuple, list)) or len(w) != 2:
        return w
    frozen = quantized(op, check_fp8_parts(op, side, w))
    return QuantizedArray(frozen.values, frozen.scales, frozen.block)


def check_rank(op: str, name: str, x: Any, dims: str) -> None:
    rank = dims.count(",") + 1
    if len(x.shape) != rank:
        more = len(x.shape) > rank
        way_out = (
            "Use jax.vmap for leading batch dimensions." if more else "Add one of size 1: jnp.expand_dims."
        )
        raise ValueError(f"{op}: {name} is {describe(x)}, need {rank} dimensions {dims}. {way_out}")


def _scale_shape(side: Side, values: Any, block: tuple[int, int]) -> list[int]:
    rows, k = side.sizes(values.shape)
    return [*values.shape[:-2], *side.stored((-(-rows // block[0]), -(-k // block[1])))]


def _original(side: Side) -> str:
    return f"jax_deepgemm.quantize({side.name}, {side.stored(side.blocks[0])})"


def check_scale_dtype(op: str, side: Side, values: Any, scales: Any) -> None:
    dtype = np.dtype(scales.dtype)
    if dtype == FLOAT32:
        return
    name = side.name
    if jnp.issubdtype(dtype, jnp.floating):
        way_out = "Convert them: scales.astype(jnp.float32)."
    elif dtype == np.dtype(np.int32):
        count = _scale_shape(side, values, side.blocks[0])[-1]
        unpack = "jax_deepgemm.quantization.unpack_ue8m0_from_int"
        way_out = f"Packed UE8M0 words become float32 with {unpack}(scales)[..., :{count}]."
    else:
        way_out = f"Quantise the bfloat16 or float32 array again: {_original(side)}."
    raise ValueError(f"{op}: scales of {name} are {dtype.name}, need float32. {way_out}")


def resolve_block(
    op: str, side: Side, values: Any, scales: Any, block: tuple[int, int] | None
) -> tuple[int, int]:
    """(rows, k) under one scale; a bare tuple's block follows from the shape of its scales."""
    given = list(scales.shape)
    if block is not None:
        allowed = [side.stored(b) for b in side.blocks]
        if block not in allowed:
            raise ValueError(
                f"{op}: {side.name} has one scale per block {block}, need {' or '.join(map(str, allowed))} "
                f"for {side.name} stored {side.dims}. "
                f"Quantise it so: jax_deepgemm.quantize({side.name}, {allowed[0]})."
            )
        candidates: tuple[tuple[int, int], ...] = (side.stored(block),)
    else:
        candidates = side.blocks
    for candidate in candidates:
        if given == _scale_shape(side, values, candidate):
            return candidate
    need = " or ".join(f"{_scale_shape(side, values, b)} (block {side.stored(b)})" for b in candidates)
    raise ValueError(
        f"{op}: scales of {side.name} are {given}, need {need} for values {list(values.shape)} {side.dims}. "
        f"jax_deepgemm.quantize({side.name}, {side.stored(candidates[0])}) makes them."
    )


def check_fp8_dtype(op: str, side: Side, values: Any) -> None:
    if np.dtype(values.dtype) not in FP8_DTYPES:
        raise ValueError(
            f"{op}: values of {side.name} are {np.dtype(values.dtype).name}, "
            "need float8_e4m3fn or float8_e5m2. "
            f"Quantise the bfloat16 or float32 array: {_original(side)}."
        )


def _check_k(op: str, layout: str, a: Any, b: Any) -> tuple[int, int, int]:
    """(m, n, k), or an error that names the layout in which the shapes would fit."""
    side_a, side_b = sides(layout)
    (m, k), (n, k_b) = side_a.sizes(a.shape), side_b.sizes(b.shape)
    if k == k_b:
        return m, n, k
    fits = [
        other for other in LAYOUTS if (s := sides(other)) and s[0].sizes(a.shape)[1] == s[1].sizes(b.shape)[1]
    ]
    prefix = op.removesuffix(layout)
    way_out = " or ".join(f"{prefix}{f} (a {sides(f)[0].dims}, b {sides(f)[1].dims})" for f in fits)
    way_out = f"These shapes fit {way_out}." if fits else "Make both operands cover the same k."
    raise ValueError(
        f"{op}: a is {list(a.shape)} {side_a.dims} and b is {list(b.shape)} {side_b.dims}: "
        f"k differs ({k} and {k_b}). {way_out}"
    )


Parts = tuple[Side, Any, Any, tuple[int, int] | None]
"""A quantised operand before its block is known: side, values, scales, stored block or None."""


def check_fp8_parts(op: str, side: Side, x: Any) -> Parts:
    """Values and scales of one FP8 operand, of the right ranks and dtypes."""
    values, scales, block = pieces(op, side, x)
    check_rank(op, f"values of {side.name}", values, side.dims)
    check_fp8_dtype(op, side, values)
    check_scale_dtype(op, side, values, scales)
    return side, values, scales, block


def quantized(op: str, parts: Parts) -> Quantized:
    """The operand, after its scales were found to fit its values."""
    _, values, scales, _ = parts
    return Quantized(jnp.asarray(values), jnp.asarray(scales), resolve_block(op, *parts))


def quantized_pair(op: str, left: Parts, right: Parts) -> tuple[Quantized, Quantized]:
    """Both operands, whose scales must be for equally many elements of k. Scales of a bare tuple with few of
    them fit several blocks: the one that fits the other operand counts."""
    a, b = quantized(op, left), quantized(op, right)
    for wanted in sorted({a.block[1], b.block[1]}):
        pair = [_with_step(op, parts, wanted) for parts in (left, right)]
        if all(pair):
            return pair[0], pair[1]  # type: ignore[return-value]
    (side_a, *_), (side_b, *_) = left, right
    raise ValueError(
        f"{op}: a has a scale for {a.block[1]} elements of k and b for {b.block[1]}, need equally many. "
        f"Quantise them alike: jax_deepgemm.quantize(b, {side_b.stored((1, a.block[1]))}), or "
        f"jax_deepgemm.quantize(a, {side_a.stored((1, b.block[1]))})."
    )


def _with_step(op: str, parts: Parts, step: int) -> Quantized | None:
    """The operand, if its scales can be for `step` elements of k."""
    side, values, scales, block = parts
    allowed = tuple(one for one in side.blocks if one[1] == step)
    if block is not None and side.stored(block)[1] != step:
        return None
    fits = any(list(scales.shape) == _scale_shape(side, values, one) for one in allowed)
    return quantized(op, (replace(side, blocks=allowed), values, scales, block)) if fits else None


def check_bf16_operand(op: str, side: Side, x: Any) -> jax.Array:
    """One BF16 operand; its sizes are not looked at."""
    x = unwrapped(x)
    if not is_array(x):
        way_out = f"Quantised operands go to {op.replace('bf16', 'fp8')}."
        way_out = _from_fp4(op, side, x) if _is_fp4(x) or isinstance(x, PreparedFp4) else way_out
        raise_type_error(op, side.name, x, f"a bfloat16 array {side.dims}", way_out)
    check_rank(op, side.name, x, side.dims)
    if np.dtype(x.dtype) != BFLOAT16:
        fp8 = np.dtype(x.dtype) in FP8_DTYPES
        way_out = (
            f"FP8 values need their scales: use {op.replace('bf16', 'fp8')} with a QuantizedArray."
            if fp8
            else f"Convert it: {side.name}.astype(jnp.bfloat16)."
        )
        raise ValueError(f"{op}: {side.name} is {describe(x)}, need bfloat16. {way_out}")
    return jnp.asarray(x)


def check_fp8(op: str, layout: str, a: Any, b: Any) -> tuple[Quantized, Quantized, tuple[int, int, int]]:
    """Both FP8 operands and (m, n, k)."""
    both = with_fine_blocks(sides(layout))
    left, right = (check_fp8_parts(op, side, x) for side, x in zip(both, (a, b), strict=True))
    sizes = _check_k(op, layout, left[1], right[1])
    return *quantized_pair(op, left, right), sizes


def check_bf16(op: str, layout: str, a: Any, b: Any) -> tuple[jax.Array, jax.Array, tuple[int, int, int]]:
    """Both BF16 operands and (m, n, k)."""
    left, right = (check_bf16_operand(op, side, x) for side, x in zip(sides(layout), (a, b), strict=True))
    return left, right, _check_k(op, layout, left, right)


def check_c(op: str, c: Any, m: int, n: int, out_dtype: np.dtype[Any]) -> jax.Array | None:
    """C of a matrix; see `check_addend`."""
    return check_addend(op, c, (m, n), out_dtype)


def check_addend(op: str, c: Any, shape: tuple[int, ...], out_dtype: np.dtype[Any]) -> jax.Array | None:
    """C has the result's shape and dtype: it is not broadcast and not converted."""
    if c is None:
        return None
    c = unwrapped(c)
    need = f"{out_dtype.name} {list(shape)}"
    if not is_array(c):
        raise_type_error(op, "c", c, need, "Pass an array or None.")
    if tuple(c.shape) != shape:
        raise ValueError(
            f"{op}: c is {describe(c)}, need {need}: the result's shape. "
            f"To add a row or column vector, broadcast it first: jnp.broadcast_to(c, {shape})."
        )
    if np.dtype(c.dtype) != out_dtype:
        other = np.dtype(c.dtype)
        way_out = f"Convert it: c.astype(jnp.{out_dtype.name})"
        way_out += f", or ask for out_dtype=jnp.{other.name}." if other in OUT_DTYPES else "."
        raise ValueError(f"{op}: c is {describe(c)}, need {need}: the result's dtype. {way_out}")
    return jnp.asarray(c)


def dtype_option(op: str, name: str, value: Any, need: str) -> np.dtype[Any]:
    """np.dtype of a keyword argument; None, which NumPy takes for float64, is refused by its name."""
    if value is None:
        raise TypeError(f"{op}: {name} is None, need {need}. Leave it out for the default.")
    return as_dtype(op, name, value, need)


def _check_dtype_option(op: str, name: str, value: Any) -> np.dtype[Any]:
    dtype = dtype_option(op, name, value, "jnp.bfloat16 or jnp.float32")
    if dtype not in OUT_DTYPES:
        raise ValueError(
            f"{op}: {name} is {dtype.name}, need bfloat16 or float32. "
            f"Take float32 and convert: {op}(...).astype(jnp.{dtype.name})."
        )
    return dtype


def check_options(
    op: str, out_dtype: Any, reduce_dtype: Any, out_sharding: Any, config: Any, num_sms: Any, *, b: Any = None
) -> Options:
    """The keyword arguments, canonical and hashable. b: the weight, if it may be one of FP4 or with a scale a
    channel, whose products have configurations of their own."""
    out, reduce = (
        _check_dtype_option(op, "out_dtype", out_dtype),
        _check_dtype_option(op, "reduce_dtype", reduce_dtype),
    )
    if reduce not in (FLOAT32, out):
        raise ValueError(
            f"{op}: reduce_dtype is {reduce.name} and out_dtype is {out.name}, "
            "need reduce_dtype float32 or the result's dtype. "
            "Leave reduce_dtype out, or ask for out_dtype=jnp.bfloat16."
        )
    own = config is not None and (isinstance(b, PreparedFp4) or is_per_channel(b))
    config_type = products().config_type() if own else GemmConfig
    return Options(
        out_dtype=out,
        reduce_dtype=reduce,
        out_sharding=sharding_option(op, out_sharding),
        config=config_option(op, config, config_type),
        num_sms=num_sms_option(op, num_sms),
    )


def check_weight_gradient(op: str, weight_gradient: Any) -> None:
    """What shares a scale in one operand of a layer's weight gradient."""
    if weight_gradient not in WEIGHT_GRADIENTS:
        raise ValueError(
            f"{op}: weight_gradient is {weight_gradient!r}, need '1x128', or '128x128' for the faster one."
        )
