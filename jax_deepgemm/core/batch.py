"""vmap's levels: recorded, applied to plain functions, and brought to kernels that know of none.

`Batch` says for each level, outermost first, which operands carry it; its dimension stands in front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepgemm.core.sharding import Batch, ShardingRule

Carried = tuple[bool, ...]
"""For each operand, whether it has the one dimension that levels were folded into."""


def over_levels(function: Callable[..., Any], batch: Batch) -> Callable[..., Any]:
    """vmap of a function of positional arrays over recorded levels."""
    for carried in reversed(batch):
        function = jax.vmap(function, tuple(0 if on else None for on in carried))
    return function


def sizes(shapes: Sequence[Sequence[int]], batch: Batch) -> tuple[int, ...]:
    """The size of each level.

    >>> sizes([(3, 8, 16), (2, 8, 16)], ((False, True), (True, False)))
    (2, 3)
    """
    return tuple(
        next(shape[sum(on[i] for on in batch[:level])] for i, shape in enumerate(shapes) if carried[i])
        for level, carried in enumerate(batch)
    )


def own_shapes(shapes: Sequence[Sequence[int]], batch: Batch) -> list[tuple[int, ...]]:
    """Shapes without the levels' dimensions."""
    return [tuple(shape[sum(on[i] for on in batch) :]) for i, shape in enumerate(shapes)]


def fold(arrays: Sequence[jax.Array], batch: Batch) -> tuple[list[jax.Array], Carried | None]:
    """Merges levels into one leading dimension.

    An operand without any level stays as it is (one copy serves the whole batch); one with some levels is
    repeated along the others.

    Returns:
      The arrays, and for each whether it has the leading dimension (None if there are no levels).
    """
    if not batch:
        return list(arrays), None
    levels = sizes([x.shape for x in arrays], batch)
    folded = []
    for i, x in enumerate(arrays):
        carried_levels = [on[i] for on in batch]
        if any(carried_levels):
            own = x.shape[sum(carried_levels) :]
            x = jnp.expand_dims(x, [level for level, on in enumerate(carried_levels) if not on])
            x = jnp.broadcast_to(x, (*levels, *own)).reshape((math.prod(levels), *own))
        folded.append(x)
    return folded, tuple(any(on[i] for on in batch) for i in range(len(arrays)))


def without_batch(
    rule: ShardingRule,
    run: Callable[..., Sequence[jax.Array]],
    arrays: Sequence[jax.Array],
    carried: Carried,
    *,
    local: bool,
) -> list[jax.Array]:
    """Runs a function that knows no batch dimension on folded arrays: once, where the batch can lie along
    one of the op's own dimensions, and otherwise in a loop.

    Args:
      rule: names of the op's dimensions.
      run: of arrays without the batch dimension; results in the rule's order.
      arrays: as `fold` gives them.
      carried: which of them have the batch dimension.
      local: whether pieces of the op's dimensions can be computed by themselves, so that a dimension may be
        made of several of them.

    Returns:
      Results with the batch dimension in front.
    """
    count = next(x.shape[0] for x, on in zip(arrays, carried, strict=True) if on)
    if local and lies_along_rows(rule, carried):
        merged = [x.reshape(-1, *x.shape[2:]) if on else x for x, on in zip(arrays, carried, strict=True)]
        return [y.reshape(count, -1, *y.shape[1:]) for y in run(*merged)]
    mapped = [x for x, on in zip(arrays, carried, strict=True) if on]

    def one(own: list[jax.Array]) -> list[jax.Array]:
        rest = iter(own)
        return list(run(*(next(rest) if on else x for x, on in zip(arrays, carried, strict=True))))

    return list(lax.map(one, mapped))


def lies_along_rows(rule: ShardingRule, carried: Carried) -> bool:
    """Whether a batch is more of the op's first dimension.

    That dimension is cut over devices, each of which computes its piece alone, so pieces of different
    problems may lie one behind the other: if every result and every operand of the batch begins with it, no
    other operand has it, and neither a sum nor a block of scales runs along it.

    >>> rows = ShardingRule.parse("m k, k n -> m n", reduces=("k",))
    >>> lies_along_rows(rows, (True, False)), lies_along_rows(rows, (True, True))
    (True, False)
    """
    first = next((factors[0] for factors in rule.results if factors), None)
    if first is None or first in rule.reduces or first in rule.blocks:
        return False
    if first in {data for data, _ in rule.blocks.values()}:
        return False
    leads = all(factors[:1] == (first,) and first not in factors[1:] for factors in rule.results)
    return leads and all(
        (factors[:1] == (first,) and first not in factors[1:]) if on else first not in factors
        for factors, on in zip(rule.operands, carried, strict=True)
    )
