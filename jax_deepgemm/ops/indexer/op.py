"""Logits as ops. Rows of tokens, and keys, which are the columns of the result, are cut freely; over heads
partial sums are exchanged. The dimension d, over which nothing can be exchanged before relu, stays whole."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepgemm.core.declaration import Dims
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import ShardingPlan
from jax_deepgemm.ops.indexer import fp4, reference
from jax_deepgemm.ops.indexer.prepare import prepare, prepare_packed

_HINT = "Logits have gradients through mqa_logits and bf16_mqa_logits of jax_deepgemm.indexer."


def _result(*shapes: Dims, out_dtype: Any, columns: int | None = None, **_: Any) -> list[tuple[Dims, Any]]:
    q, k, *_rest = shapes
    return [((q[0], k[0] if columns is None else columns), out_dtype)]


def _shifted(
    plan: ShardingPlan, start: jax.Array, end: jax.Array, columns: int | None
) -> tuple[jax.Array, jax.Array]:
    """Windows as this device counts its columns.

    Pieces of keys begin with a key of their own. Compressed, all keys are there, and a piece of the columns
    begins so much further on in each window.
    """
    start, end = reference.windows(start, end, plan.size["n"])
    if columns is None:
        offset = plan.offset("n")
        return start - offset, end - offset
    return start + plan.offset("c"), end


def _recut(
    plan: ShardingPlan, *arrays: jax.Array, columns: int | None = None, **_: Any
) -> tuple[list[jax.Array], dict[str, Any]]:
    if not plan.cut("n" if columns is None else "c"):
        return list(arrays), {}
    *others, start, end = arrays
    changed = {} if columns is None else {"columns": plan.local_size("c")}
    return [*others, *_shifted(plan, start, end, columns)], changed


def _expanded_logits(q: jax.Array, k: jax.Array, words: jax.Array, *rest: jax.Array, **options: Any) -> Any:
    return reference.scaled_logits(q, *fp4.expand(k, words), *rest, **options)


@functools.cache
def logits_op(scaled: bool, compressed: bool, packed: bool = False) -> Op:
    """The logits of one form: keys with scales (FP8, or packed: FP4) or without (BF16), of all keys or of
    windows."""
    names = ("mqa_logits" if scaled else "bf16_mqa_logits", *["fp4"] * packed, *["compressed"] * compressed)
    keys = f"n {'e' if packed else 'd'}" + (", n" if scaled else "")
    return Op(
        "_".join(names),
        f"s h d, {keys}, s h, s, s -> s {'c' if compressed else 'n'}",
        _result,
        _expanded_logits if packed else reference.scaled_logits if scaled else reference.logits,
        reduces=("h",),
        recut=_recut,
        kernel=LazyKernel("jax_deepgemm.ops.indexer.kernel", "scaled" if scaled else "plain", batched=True),
        kernel_prepare=prepare_packed if packed else functools.partial(prepare, scaled),
        grad_hint=_HINT,
    )


def _gradients_on_shard(compressed: bool, plan: ShardingPlan, local: Any, *arrays: jax.Array) -> Any:
    """Each device's sums over its tokens, heads and keys, then those of the devices."""
    q, k, weights, start, end, by = arrays
    columns = plan.axes.get("c" if compressed else "n", ())
    if compressed and columns:
        by = lax.all_gather(by, columns, axis=by.ndim - 1, tiled=True)
    elif columns:
        start, end = _shifted(plan, start, end, None)
    depth = plan.axes.get("d", ())
    if depth:
        q, k = (lax.all_gather(x, depth, axis=x.ndim - 1, tiled=True) for x in (q, k))
    dq, dk, dw = local(q, k, weights, start, end, by)
    keys = plan.axes.get("n", ())
    if keys:
        dq, dw = lax.psum((dq, dw), keys)
    tokens = (*plan.axes.get("s", ()), *plan.axes.get("h", ()))
    if tokens:
        dk = lax.psum(dk, tokens)
    if depth:
        offset, size = plan.offset("d"), plan.local_size("d")
        dq, dk = (lax.dynamic_slice_in_dim(x, offset, size, axis=x.ndim - 1) for x in (dq, dk))
    return None, [dq, dk, dw]


@functools.cache
def gradients_op(compressed: bool) -> Op:
    """The gradients of q, k and weights, for that of the logits."""

    def result(q: Dims, k: Dims, weights: Dims, *_: Dims, **__: Any) -> list[tuple[Dims, Any]]:
        return [(q, jnp.float32), (k, jnp.float32), (weights, jnp.float32)]

    return Op(
        "mqa_logits_gradients" + ("_compressed" if compressed else ""),
        f"s h d, n d, s h, s, s, s {'c' if compressed else 'n'} -> s h d, n d, s h",
        result,
        reference.gradients,
        spmd=functools.partial(_gradients_on_shard, compressed),
        grad_hint=_HINT,
    )
