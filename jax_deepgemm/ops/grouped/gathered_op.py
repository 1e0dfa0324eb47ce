"""Grouped GEMMs as ops whose rows are named by an index, and read from where they are.

`index` says for each row of the product (m-grouped), or for each value of k (k-grouped), which row of the
operand it is; a number that is no row is a row of zeros. That operand's rows are whole on each device, and
the index is cut as what it stands for: the product's rows, or k. Everything else is as in op.py, and so are
the numbers: those of `take` and the grouped GEMM behind it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_deepgemm.core.derivatives import Wanted
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import ShardingPlan
from jax_deepgemm.ops.grouped import op as ops
from jax_deepgemm.ops.grouped import prepare, reference, segments
from jax_deepgemm.ops.rows.op import TAKE
from jax_deepgemm.ops.rows.reference import take

_OTHER = {"nt": "nn", "nn": "nt"}


def _kernel(name: str, **form: str) -> LazyKernel:
    return LazyKernel("jax_deepgemm.ops.grouped.kernel", name, batched=True, **form)


def _taken(arrays: tuple[jax.Array, ...], index: int, which: tuple[int, ...]) -> list[jax.Array]:
    """Operands of the op without an index: `which` of them by the one at place `index`."""
    rows = arrays[index]
    every = [take(x, rows)[0] if i in which else x for i, x in enumerate(arrays)]
    return every[:index] + every[index + 1 :]


def _reference(
    function: Callable[..., list[jax.Array]], at: int, which: tuple[int, ...]
) -> Callable[..., list[jax.Array]]:
    def gathered(*arrays: jax.Array, **params: Any) -> list[jax.Array]:
        return function(*_taken(arrays, at, which), **params)

    return gathered


def _recut(function: Callable[..., ops.Recut], at: int) -> Callable[..., ops.Recut]:
    """A device's piece: the index is cut already, and means rows that the device has."""

    def recut(plan: ShardingPlan, *arrays: jax.Array, **params: Any) -> ops.Recut:
        others, changed = function(plan, *arrays[:at], *arrays[at + 1 :], **params)
        return (*others[:at], arrays[at], *others[at:]), changed

    return recut


def _rows_sharding(wanted: Wanted, index: jax.Array) -> PartitionSpec | None:
    """On Explicit axes, of the cotangents of rows before they are summed."""
    if wanted.out_sharding is None:
        return None
    return PartitionSpec(*jax.typeof(index).sharding.spec, *wanted.out_sharding[1:])


def _summed(wanted: Wanted, rows: jax.Array, index: jax.Array) -> jax.Array:
    """The cotangent of an operand: the sums of those of its rows, all of which each device has."""
    if wanted.out_sharding is not None:
        rows = jax.sharding.reshard(rows, PartitionSpec(None, *wanted.out_sharding[1:]))
        index = jax.sharding.reshard(index, PartitionSpec(None))
    assert TAKE.transpose is not None
    found = TAKE.transpose(0, [rows], [wanted, index])
    return found if wanted.out_sharding is None else jax.sharding.reshard(found, wanted.out_sharding)


# Rows in groups


def _m_fp8(name: str, scales_of_b: str) -> Op:
    rule = f"t k, t kb, g n k, {scales_of_b}, m, s, o -> m n"
    return Op(
        name,
        rule,
        lambda a, sa, b, sb, index, *_, out_dtype, **__: [((index[0], b[1]), out_dtype)],
        _reference(reference.m_grouped_fp8_gemm, 4, (0, 1)),
        reduces=("k", "g"),
        blocks=ops._blocks(rule),
        recut=_recut(ops.recut_m_grouped, 4),
        kernel=_kernel("m_gathered_fp8_gemm"),
        kernel_prepare=prepare.m_gathered_fp8,
        grad_hint=ops.FP8_GRADIENT_HINT,
    )


def _m_transpose(
    layout: str,
    which: int,
    cotangents: list[jax.Array],
    values: list[Any],
    *,
    rows_format: str,
    **params: Any,
) -> jax.Array:
    """da: rows of dd @ b, summed where they came from one; db = dd.T @ a, of copies of its rows: reading them
    by the index once for each of db's tiles takes longer (docs/performance.md)."""
    a, b, index, group_sizes, group_offset = values
    wanted = values[which]
    dd = cotangents[0].astype(wanted.dtype)
    if which == 0:
        hints = {"expected_m": params.get("expected_m"), "out_sharding": _rows_sharding(wanted, index)}
        own = ops._cotangent_params(wanted, params, rows_format=rows_format, **hints)
        [rows] = ops.M_GROUPED_BF16[_OTHER[layout]](dd, b, group_sizes, group_offset, **own)
        return _summed(wanted, rows, index)
    groups = wanted.shape[0]
    if rows_format == "segments":
        group_sizes, group_offset = (
            segments.by_group(group_sizes, rows_format, dd.shape[0], group_offset, groups),
            jnp.zeros_like(group_offset),
        )
    own = ops._cotangent_params(wanted, params, rows_format=rows_format, num_groups=groups)
    [rows] = TAKE(a, index, dtypes=(a.dtype,))
    pair = (dd, rows) if layout == "nt" else (rows, dd)
    return ops.K_GROUPED_BF16(*pair, group_sizes, group_offset, **own)[0]


def _m_bf16(layout: str) -> Op:
    return Op(
        f"m_gathered_bf16_gemm_{layout}",
        f"t k, {'g n k' if layout == 'nt' else 'g k n'}, m, s, o -> m n",
        lambda a, b, index, *_, out_dtype, **__: [((index[0], b[1 if layout == "nt" else 2]), out_dtype)],
        _reference(functools.partial(reference.m_grouped_bf16_gemm, layout=layout), 2, (0,)),
        reduces=("k", "g"),
        recut=_recut(ops.recut_m_grouped, 2),
        kernel=_kernel("m_gathered_bf16_gemm", layout=layout),
        kernel_prepare=functools.partial(prepare.m_gathered_bf16, layout=layout),
        jvp=functools.partial(ops._jvp, lambda: M_GATHERED_BF16[layout]),
        transpose=functools.partial(_m_transpose, layout),
    )


M_GATHERED_FP8_BLOCK = _m_fp8("m_gathered_fp8_gemm_block", "g nb kb")
M_GATHERED_FP8_ROW = _m_fp8("m_gathered_fp8_gemm_row", "g n kb")
M_GATHERED_BF16 = {layout: _m_bf16(layout) for layout in ops.FORMS}


# k in groups


def _k_transpose(
    side: str,
    which: int,
    cotangents: list[jax.Array],
    values: list[Any],
    *,
    rows_format: str,
    **params: Any,
) -> jax.Array:
    """As without an index: what it names is read by it, and summed where it came from."""
    if which == 5:
        return cotangents[0]
    wanted, other, (index, group_sizes, group_offset) = values[which], values[1 - which], values[2:5]
    dd = cotangents[0].astype(wanted.dtype)
    rows = index.shape[-1]
    if rows_format == "segments":
        group_sizes = segments.by_row(group_sizes, rows)
    layout, indexed = ("nt", "nn")[which], "ab"[which] == side
    own = ops._cotangent_params(wanted, params, rows_format=rows_format, expected_m=None)
    if not indexed:
        return M_GATHERED_BF16[layout](other, dd, index, group_sizes, group_offset, **own)[0]
    own["out_sharding"] = _rows_sharding(wanted, index)
    [found] = ops.M_GROUPED_BF16[layout](other, dd, group_sizes, group_offset, **own)
    return _summed(wanted, found, index)


def _k_bf16(side: str, base: Op | None = None) -> Op:
    operands = "r m, k n" if side == "a" else "k m, r n"
    return Op(
        f"k_gathered_{side}_bf16_gemm" + ("" if base is None else "_add"),
        f"{operands}, k, s, o" + (" -> g m n" if base is None else ", g m n -> g m n"),
        lambda a, b, *_, num_groups, out_dtype, **__: [((num_groups, a[1], b[1]), out_dtype)],
        _reference(reference.k_grouped_bf16_gemm, 2, ("ab".index(side),)),
        reduces=("k",),
        recut=_recut(ops._recut_k_grouped, 2),
        kernel=_kernel("k_gathered_bf16_gemm", side=side),
        kernel_prepare=functools.partial(prepare.k_gathered_bf16, side=side),
        aliases={} if base is None else {5: 0},
        addend=None if base is None else 5,
        base=base,
        jvp=functools.partial(ops._jvp, lambda: K_GATHERED_BF16[side]),
        transpose=functools.partial(_k_transpose, side),
    )


K_GATHERED_BF16: dict[str, Op] = {side: _k_bf16(side) for side in "ab"}
"""By the operand that the index is of."""
K_GATHERED_BF16_ADD = {side: _k_bf16(side, base) for side, base in K_GATHERED_BF16.items()}
