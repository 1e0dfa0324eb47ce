"""Logits of keys that lie in pages as ops. Requests, their tokens, and columns are cut freely; over heads
partial sums are exchanged. The cache is whole on each device."""

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
from jax_deepgemm.ops.indexer.prepare import prepare_paged, prepare_tokens, there


def parts_of(cache: jax.Array, depth: int) -> tuple[jax.Array, jax.Array]:
    """Values e4m3 [pages, page, d] and scales float32 [pages, page] of pages as bytes: all values, then all
    scales.

    >>> cache = jnp.zeros((3, 16 * (32 + 4)), jnp.uint8)
    >>> [part.shape for part in parts_of(cache, 32)]
    [(3, 16, 32), (3, 16)]
    """
    pages, size = cache.shape
    page = size // (depth + 4)
    values, scales = cache[:, : page * depth], cache[:, page * depth :]
    return (
        lax.bitcast_convert_type(values.reshape(pages, page, depth), jnp.float8_e4m3fn),
        lax.bitcast_convert_type(scales.reshape(pages, page, 4), jnp.float32),
    )


def fp4_parts_of(cache: jax.Array, depth: int) -> tuple[jax.Array, jax.Array]:
    """The same of pages in FP4: bytes uint8 [pages, page, d / 2], and words of scales int32 [pages, page].

    >>> cache = jnp.zeros((3, 16 * (16 + 4)), jnp.uint8)
    >>> [part.shape for part in fp4_parts_of(cache, 32)]
    [(3, 16, 16), (3, 16)]
    """
    pages, size = cache.shape
    row = depth // 2
    page = size // (row + 4)
    values, words = cache[:, : page * row], cache[:, page * row :]
    return values.reshape(pages, page, row), lax.bitcast_convert_type(
        words.reshape(pages, page, 4), jnp.int32
    )


def _two_arrays(
    q: jax.Array, values: jax.Array, scales: jax.Array, *rest: jax.Array, packed: bool, **options: Any
) -> Any:
    """Request by request: pages outside of the cache hold zeros."""
    weights, start, end, tables = rest
    pages, _, row = values.shape
    values, scales = (jnp.pad(x, ((0, 1), *((0, 0),) * (x.ndim - 1))) for x in (values, scales))

    def of_request(request: tuple[jax.Array, ...]) -> jax.Array:
        q, weights, start, end, table = request
        at = jnp.where((table >= 0) & (table < pages), table, pages)
        keys, factors = values[at].reshape(-1, row), scales[at].reshape(-1)
        if packed:
            keys, factors = fp4.expand(keys, factors)
        return reference.scaled_logits(q, keys, factors, weights, start, end, **options)[0]

    return [lax.map(of_request, (q, weights, start, end, tables))]


def _of_tokens(paged: Any, *arrays: jax.Array, **options: Any) -> Any:
    """The same of tokens, each with the table of its request. Those of nobody see nothing."""
    *others, end, tables, whose = arrays
    mine, nobody = there(whose, tables), tables.shape[0]
    tables = jnp.pad(tables, ((0, 1), (0, 0)), constant_values=-1)
    own = tables[jnp.where(mine, whose, nobody)]
    return paged(*others, jnp.where(mine[:, None], end, 0), own, **options)


def _one_buffer(q: jax.Array, cache: jax.Array, *rest: jax.Array, packed: bool, **options: Any) -> Any:
    parts = fp4_parts_of if packed else parts_of
    return _two_arrays(q, *parts(cache, q.shape[-1]), *rest, packed=packed, **options)


def _result(q: Dims, *_: Dims, out_dtype: Any, columns: int, **__: Any) -> list[tuple[Dims, Any]]:
    return [((q[0], q[1], columns), out_dtype)]


def _recut(
    start_at: int, plan: ShardingPlan, *arrays: jax.Array, columns: int, **_: Any
) -> tuple[list[jax.Array], dict[str, Any]]:
    """A piece of the columns begins with a later key."""
    if not plan.cut("c"):
        return list(arrays), {}
    shifted = list(arrays)
    shifted[start_at] += plan.offset("c")
    return shifted, {"columns": plan.local_size("c")}


@functools.cache
def paged_op(joined: bool, packed: bool = False, of_tokens: bool = False) -> Op:
    """Logits [b, t, c] of q [b, t, h, d], a cache, weights [b, t, h], the first key of a row's columns and
    the end of its context [b, t], and tables of pages [b, m].

    Args:
      joined: whether the cache is bytes [pages, page (d + 4)], instead of values and scales.
      packed: whether keys are FP4, of d / 2 bytes and a word of scales each.
      of_tokens: whether tables are of requests, [r, m], and a last operand says whose each token is, [b].
    """
    parts = "p y" if joined else "p y e, p y" if packed else "p y d, p y"
    tables = "r m, b" if of_tokens else "b m"
    reference = functools.partial(_one_buffer if joined else _two_arrays, packed=packed)
    return Op(
        "paged_mqa_logits" + "_fp4" * packed + "_joined" * joined + "_of_tokens" * of_tokens,
        f"b t h d, {parts}, b t h, b t, b t, {tables} -> b t c",
        _result,
        functools.partial(_of_tokens, reference) if of_tokens else reference,
        reduces=("h",),
        recut=functools.partial(_recut, 3 if joined else 4),
        kernel=LazyKernel(
            "jax_deepgemm.ops.indexer.kernel",
            "paged_joined" if joined else "paged",
            packed=packed,
            of_tokens=of_tokens,
        ),
        kernel_prepare=prepare_tokens if of_tokens else prepare_paged,
        grad_hint="Logits of a cache have none: mqa_logits and bf16_mqa_logits are for training.",
    )


def bytes_of(values: jax.Array, scales: jax.Array) -> jax.Array:
    """The inverse of `parts_of`, and of `fp4_parts_of`.

    >>> values, scales = jnp.ones((2, 16, 32), jnp.float8_e4m3fn), jnp.ones((2, 16))
    >>> bytes_of(values, scales).shape
    (2, 576)
    """
    pages = values.shape[0]
    first = lax.bitcast_convert_type(values, jnp.uint8).reshape(pages, -1)
    second = lax.bitcast_convert_type(scales, jnp.uint8).reshape(pages, -1)
    return jnp.concatenate([first, second], axis=1)
