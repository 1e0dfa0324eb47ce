"""What a grouped GEMM accepts, checked while tracing; the numbers in group sizes are known only at run time
and are cut there (segments.py).

Each error says what was given, the rule, and the way out. Nothing here changes the dtype of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.ops.gemm.checks import (
    BLOCKED,
    OUT_DTYPES,
    PER_ROW,
    Quantized,
    Side,
    check_bf16_operand,
    check_fp8_parts,
    describe,
    is_array,
    quantized_pair,
    raise_type_error,
)
from jax_deepgemm.ops.grouped import layouts, segments

INT32 = np.iinfo(np.int32)


@dataclass(frozen=True)
class Where:
    """Whose rows are whose, as the ops take it; segments.py describes the two formats of `group_sizes`."""

    group_sizes: jax.Array
    group_offset: jax.Array
    rows_format: str


@dataclass(frozen=True)
class Rows:
    """The arguments that describe groups of rows, as given."""

    group_sizes: Any
    m_indices: Any
    ends: Any
    alignment: Any
    group_offset: Any


def m_grouped_sides(layout: str) -> tuple[Side, Side]:
    """A [m, k] and B [g, n, k] or [g, k, n]."""
    return Side("a", "m", False, (PER_ROW,)), Side("b", "n", layout == "nn", (BLOCKED, PER_ROW), ("g",))


def masked_sides(layout: str) -> tuple[Side, Side]:
    """A [g, m, k] and B [g, n, k] or [g, k, n]."""
    a, b = m_grouped_sides(layout)
    return Side(a.name, a.rows, a.k_first, a.blocks, ("g",)), b


def k_grouped_sides(layout: str) -> tuple[Side, Side]:
    """A [k, m] and B [k, n] (tn), or [m, k] and [n, k] (nt); one scale per row and 128 of k."""
    first = layout == "tn"
    return Side("a", "m", first, (PER_ROW,)), Side("b", "n", first, (PER_ROW,))


Sides = tuple[Side, Side]


def check_fp8(op: str, sides: Sides, a: Any, b: Any) -> tuple[Quantized, Quantized, tuple[int, int, int]]:
    """Both FP8 operands and (m, n, k)."""
    left, right = (check_fp8_parts(op, side, x) for side, x in zip(sides, (a, b), strict=True))
    sizes = _check_sizes(op, sides, left[1], right[1])
    return *quantized_pair(op, left, right), sizes


def check_bf16(op: str, sides: Sides, a: Any, b: Any) -> tuple[jax.Array, jax.Array, tuple[int, int, int]]:
    """Both BF16 operands and (m, n, k)."""
    left, right = bf16_pair(op, sides, a, b)
    return left, right, _check_sizes(op, sides, left, right)


def bf16_pair(op: str, sides: Sides, a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    """Both BF16 operands; their sizes are not compared."""
    left, right = (check_bf16_operand(op, side, x) for side, x in zip(sides, (a, b), strict=True))
    return left, right


def _check_sizes(op: str, sides: Sides, a: Any, b: Any) -> tuple[int, int, int]:
    """(m, n, k), after k and the groups of both operands were found equal."""
    side_a, side_b = sides
    both = f"a is {list(a.shape)} {side_a.dims} and b is {list(b.shape)} {side_b.dims}"
    if side_b.lead and b.shape[0] == 0:
        raise ValueError(f"{op}: b is {list(b.shape)} {side_b.dims}: there are no groups; need at least one.")
    if side_a.lead and a.shape[0] != b.shape[0]:
        raise ValueError(
            f"{op}: {both}: the number of groups differs ({a.shape[0]} and {b.shape[0]}). "
            "Every group needs its rows of a and its matrix of b."
        )
    (m, k), (n, k_b) = side_a.sizes(a.shape), side_b.sizes(b.shape)
    if k != k_b:
        raise ValueError(f"{op}: {both}: k differs ({k} and {k_b}). {_other_form(op, k, n)}")
    return m, n, k


def _other_form(op: str, k: int, n: int) -> str:
    """A way out where b fits if it is read with its last two dimensions exchanged."""
    if k != n:
        return "Make both operands cover the same k."
    if op.startswith("m_grouped") and op.endswith("_contiguous"):
        given, other, stored = (
            ("_nt_", "_nn_", "[g, k, n]") if "_nt_" in op else ("_nn_", "_nt_", "[g, n, k]")
        )
        return f"For b stored {stored} use {op.replace(given, other)}."
    return "Exchange the last two dimensions of b: jnp.swapaxes(b, -1, -2)."


def as_int32(op: str, name: str, x: Any, shape: str) -> jax.Array:
    """An array of integers as int32; larger numbers are cut at int32's limits, not wrapped."""
    x, need = unwrapped(x), f"an int32 array {shape}"
    if not is_array(x):
        raise_type_error(op, name, x, need, f"Write jnp.array({name}, jnp.int32).")
    dtype = np.dtype(x.dtype)
    if not jnp.issubdtype(dtype, np.integer):
        raise ValueError(f"{op}: {name} is {describe(x)}, need {need}. Convert it: {name}.astype(jnp.int32).")
    if dtype == np.int32:
        return jnp.asarray(x)
    limits = np.iinfo(dtype)
    if limits.min < INT32.min or limits.max > INT32.max:
        x = x.clip(max(limits.min, INT32.min), INT32.max)
    return jnp.asarray(x.astype(np.int32))


def _check_vector(op: str, name: str, x: Any, length: int, what: str, at_least: bool = False) -> jax.Array:
    """A vector of int32 with one entry for each of `length`."""
    vector = as_int32(op, name, x, f"[{length}]")
    bad = vector.ndim != 1 or (vector.shape[0] < length if at_least else vector.shape[0] != length)
    if bad:
        need = f"[{length}]" + (" or more" if at_least else "")
        raise ValueError(f"{op}: {name} is {describe(x)}, need int32 {need}: {what}.")
    return vector


def check_offset(op: str, group_offset: Any) -> jax.Array:
    """int32 [1]."""
    if group_offset is None:
        return jnp.zeros(1, jnp.int32)
    if isinstance(group_offset, int | np.integer) and not isinstance(group_offset, bool):
        group_offset = np.asarray(group_offset)
    offset = as_int32(op, "group_offset", group_offset, "of one number, [] or [1]")
    if offset.shape not in ((), (1,)):
        raise ValueError(
            f"{op}: group_offset is {describe(group_offset)}, need one number, [] or [1]: "
            "the index of b's first group among all groups."
        )
    return offset.reshape(1)


def check_rows(op: str, rows: Rows, m: int, groups: int) -> Where:
    """Whose rows are whose, of exactly one of the three descriptions."""
    named = [name for name in ("group_sizes", "m_indices", "ends") if getattr(rows, name) is not None]
    if len(named) != 1:
        raise TypeError(
            f"{op}: got {' and '.join(named) or 'no description of the groups'}, need exactly one of "
            f"group_sizes (rows of each group, [{groups}]), m_indices (group of each row, [{m}]) and "
            f"ends (end of each group, [{groups}])."
        )
    o = check_offset(op, rows.group_offset)
    some = rows.group_offset is not None
    every = "one number per group" + (", also for groups that b does not have" if some else "")
    if rows.m_indices is not None:
        index = _check_vector(
            op, "m_indices", rows.m_indices, m, "the group of each row of the product, -1 for none"
        )
        return Where(layouts.segments_of_indices(_whole(index), groups, o), o, "segments")
    if rows.ends is not None:
        default = layouts.get_mk_alignment_for_contiguous_layout()
        step = default if rows.alignment is None else layouts.positive(op, "alignment", rows.alignment)
        ends = _check_vector(op, "ends", rows.ends, groups, every, some)
        return Where(layouts.segments_of_ends(_whole(ends), m, step), o, "segments")
    return Where(_check_vector(op, "group_sizes", rows.group_sizes, groups, every, some), o, "sizes")


def _whole(x: jax.Array) -> jax.Array:
    """x on every device, where its type says that Explicit mesh axes cut it."""
    sharding = jax.typeof(x).sharding
    return jax.sharding.reshard(x, PartitionSpec(None)) if sharding.mesh.explicit_axes else x


def check_k_groups(op: str, group_sizes: Any, num_groups: Any, group_offset: Any) -> tuple[Where, int]:
    """The groups of k, and how many of them the result has."""
    if isinstance(group_sizes, layouts.Ranges):
        starts, ends = (_whole(as_int32(op, "ranges", x, "[g]")) for x in group_sizes)
        groups = jnp.arange(starts.shape[0], dtype=jnp.int32)
        where = segments.write(segments.Segments(starts, ends, groups))
        return Where(where, check_offset(op, None), "segments"), starts.shape[0]
    sizes = as_int32(op, "group_sizes", group_sizes, "[g]")
    if sizes.ndim != 1 or not sizes.shape[0]:
        raise ValueError(
            f"{op}: group_sizes is {describe(group_sizes)}, need int32 [g] with at least one group."
        )
    if num_groups is None:
        if group_offset is not None:
            raise ValueError(
                f"{op}: group_offset is given without num_groups, need both. "
                "Say how many groups from there on the result has: num_groups=..."
            )
        count = sizes.shape[0]
    else:
        count = layouts.positive(op, "num_groups", num_groups)
    if count > sizes.shape[0] or (group_offset is None and count != sizes.shape[0]):
        raise ValueError(
            f"{op}: num_groups is {count} and group_sizes is {describe(group_sizes)}, need a size for each "
            "group. For some of the groups give group_offset too."
        )
    return Where(sizes, check_offset(op, group_offset), "sizes"), count


def check_masked_m(op: str, masked_m: Any, groups: int) -> jax.Array:
    return _check_vector(op, "masked_m", masked_m, groups, "the number of rows of each group")


def check_expected_m(op: str, expected_m: Any) -> int | None:
    return None if expected_m is None else layouts.positive(op, "expected_m", expected_m)


def check_c(op: str, c: Any, shape: tuple[int, ...], out_dtype: np.dtype[Any]) -> jax.Array | None:
    """C has the result's shape and dtype: it is not broadcast and not converted."""
    if c is None:
        return None
    c = unwrapped(c)
    need = f"{out_dtype.name} {list(shape)}"
    if not is_array(c):
        raise_type_error(op, "c", c, need, "Pass an array or None.")
    if tuple(c.shape) != shape:
        raise ValueError(f"{op}: c is {describe(c)}, need {need}: the result's shape, [g, m, n].")
    other = np.dtype(c.dtype)
    if other != out_dtype:
        way_out = f"Convert it: c.astype(jnp.{out_dtype.name})"
        way_out += f", or ask for out_dtype=jnp.{other.name}." if other in OUT_DTYPES else "."
        raise ValueError(f"{op}: c is {describe(c)}, need {need}: the result's dtype. {way_out}")
    return jnp.asarray(c)


def check_hints(op: str, zero_rows: Any, expected_m: Any) -> dict[str, Any]:
    """The parameters of masked ops."""
    return {"zero_rows": check_zero_rows(op, zero_rows), "expected_m": check_expected_m(op, expected_m)}


def check_zero_rows(op: str, zero_rows: Any) -> bool:
    """A static flag."""
    if not isinstance(zero_rows, bool):
        raise TypeError(f"{op}: zero_rows is {zero_rows!r}, need True or False; it is static.")
    return zero_rows
