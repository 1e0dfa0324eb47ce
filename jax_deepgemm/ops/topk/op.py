"""The largest numbers of rows as ops, and the numbers at given columns.

    topk     x[, start, end]   -> [values, ] indices     no derivative: api.py gives the values theirs
    at       x, indices        -> values                 linear in x, jnp
    to       values, indices   -> x                      its transpose: what was not chosen is zero

Rows are cut freely. Where columns are cut, each device finds the largest of its piece, and then those of what
all have found: in every order that a result can have, of equal numbers the lower column is first there too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepgemm.core.declaration import Dims
from jax_deepgemm.core.derivatives import Wanted, same_varying_axes
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import ShardingPlan, pieces_of_whole
from jax_deepgemm.ops.topk import reference
from jax_deepgemm.ops.topk.problem import beyond

_pieces = pieces_of_whole("k")


@functools.cache
def topk_op(windows: bool, values: bool, by_index: bool, kernel: bool) -> Op:
    """(x[, start, end]) -> [[values,] indices], with `k=` and `dtype=`, that of x.

    Args:
      windows: whether rows have a first and a last column of their own.
      values: whether the numbers are a result too.
      by_index: whether results are in the order of their columns, not the largest first.
      kernel: whether the call is within the limits of the kernel.
    """
    name = "topk" + "_windows" * windows + "_values" * values + "_by_index" * by_index

    def result(x: Dims, *_: Dims, k: int, dtype: np.dtype, **__: Any) -> list[tuple[Dims, Any]]:
        shape = (x[0], k)
        return [*([(shape, dtype)] if values else []), (shape, np.dtype(np.int32))]

    def plain(*arrays: jax.Array, k: int, **_: Any) -> list[jax.Array]:
        return reference.topk(*arrays, k=k, by_index=by_index, values=values)

    return Op(
        name,
        ("m n, m, m" if windows else "m n") + (" -> m k, m k" if values else " -> m k"),
        result,
        plain,
        reduces=("n",),
        spmd=functools.partial(_on_shard, plain, values),
        grad_hint="jax_deepgemm.topk has one.",
        **_run_by(kernel, by_index),
    )


def _run_by(kernel: bool, by_index: bool) -> dict[str, Any]:
    """What cuda runs."""
    if kernel:
        return {"kernel": LazyKernel("jax_deepgemm.ops.topk.kernel", "topk", by_index=by_index)}
    return {"without_kernel": _on_xla}


def _on_xla(avals: Sequence[Any], *, k: int, **_: Any) -> str:
    rows, columns = avals[0].shape[-2:]
    return f"topk: {beyond(rows, columns, k)}, so XLA sorts, which is slow."


# Columns over devices ---------------------------------------------------------------------------------------


def _on_shard(
    plain: Callable[..., Any], values: bool, plan: ShardingPlan, local: Callable[..., Any], *arrays: jax.Array
) -> Any:
    """The `spmd` of the ops: see the head of this module."""
    if not plan.cut("n"):
        return _pieces(plan, local, *arrays)
    x, *window = arrays
    first = plan.offset("n")
    *found, indices = local(x, *(jnp.clip(one, 0, plan.size["n"]) - first for one in window))
    numbers = found[0] if values else reference.at(_with_levels(plan, x), indices)
    numbers, indices = (of_all(plan, one) for one in (numbers, jnp.where(indices < 0, -1, indices + first)))
    if x.ndim == numbers.ndim:
        everywhere = [jnp.full_like(one, at) for one, at in zip(window, (0, numbers.shape[-1]))]
        *best, places = local(numbers, *everywhere)
    else:  # which the op, bound to the levels of x, does not take
        *best, places = plain(numbers, k=plan.size["k"])
    return None, [piece_of(plan, one) for one in (*best, reference.at(indices, places, -1))]


def _with_levels(plan: ShardingPlan, x: jax.Array) -> jax.Array:
    """x with a dimension of one for each level of vmap that it lacks."""
    levels, own = plan.rule.results[0][:-2], plan.rule.operands[0]
    return jnp.expand_dims(x, [i for i, name in enumerate(levels) if name not in own])


def of_all(plan: ShardingPlan, x: jax.Array) -> jax.Array:
    """What all devices have found in their pieces of a row, in the order of the pieces."""
    axes = plan.axes["n"]
    varying = set(axes) & set(jax.typeof(x).manual_axis_type.varying)
    return lax.all_gather(x, axes, axis=x.ndim - 1, tiled=True, to="invarying" if varying else "varying")


def piece_of(plan: ShardingPlan, x: jax.Array) -> jax.Array:
    """What a device keeps of a result that all have whole."""
    if plan.cut("k"):
        x = lax.dynamic_slice_in_dim(x, plan.offset("k"), plan.local_size("k"), axis=x.ndim - 1)
    if plan.scatter_dim is not None:
        size = x.shape[plan.scatter_dim] // plan.shards("n")
        which = plan.offset("n") // plan.local_size("n")
        x = lax.dynamic_slice_in_dim(x, which * size, size, axis=plan.scatter_dim)
    return x


# Numbers at columns -----------------------------------------------------------------------------------------


def _at(x: jax.Array, indices: jax.Array, *, out_dtype: np.dtype) -> list[jax.Array]:
    inside = (indices >= 0) & (indices < x.shape[1])
    return [reference.at(x, jnp.where(inside, indices, -1), 0).astype(out_dtype)]


def _at_on_shard(plan: ShardingPlan, local: Any, x: jax.Array, indices: jax.Array) -> Any:
    """A column that another device has counts nothing here; the sum has it."""
    return (x, indices - plan.offset("n") if plan.cut("n") else indices), None


def _to(values: jax.Array, indices: jax.Array, *, columns: int, out_dtype: np.dtype) -> list[jax.Array]:
    rows = lax.broadcasted_iota(jnp.int32, indices.shape, 0)
    zeros, values = same_varying_axes([jnp.zeros((indices.shape[0], columns), out_dtype), values])
    moved = values.astype(out_dtype)
    return [zeros.at[rows, indices].add(moved, mode="drop", wrap_negative_indices=False)]


def _to_on_shard(
    plan: ShardingPlan, values: jax.Array, indices: jax.Array, *, columns: int, **_: Any
) -> tuple[tuple[jax.Array, jax.Array], dict[str, Any]]:
    if not plan.cut("n"):
        return (values, indices), {}
    return (values, indices - plan.offset("n")), {"columns": plan.local_size("n")}


def _at_transpose(which: int, cotangents: list[jax.Array], operands: list[Any], **_: Any) -> jax.Array:
    wanted, indices = operands
    assert isinstance(wanted, Wanted)
    form = {"columns": wanted.shape[1], "out_dtype": wanted.dtype, "out_sharding": wanted.out_sharding}
    return TO(cotangents[0], indices, **form, fallback="reference")[0]


def _to_transpose(which: int, cotangents: list[jax.Array], operands: list[Any], **_: Any) -> jax.Array:
    wanted, indices = operands
    assert isinstance(wanted, Wanted)
    form = {"out_dtype": wanted.dtype, "out_sharding": wanted.out_sharding}
    return AT(cotangents[0], indices, **form, fallback="reference")[0]


AT: Op = Op(
    "numbers_at",
    "m n, m k -> m k",
    lambda x, indices, *, out_dtype: [(indices, out_dtype)],
    _at,
    reduces=("n",),
    spmd=_at_on_shard,
    jvp=lambda primals, tangents, **params: AT(tangents[0], primals[1], **params),
    transpose=_at_transpose,
)
TO: Op = Op(
    "numbers_to",
    "m k, m k -> m n",
    lambda values, indices, *, columns, out_dtype: [((indices[0], columns), out_dtype)],
    _to,
    recut=_to_on_shard,
    jvp=lambda primals, tangents, **params: TO(tangents[0], primals[1], **params),
    transpose=_to_transpose,
)
