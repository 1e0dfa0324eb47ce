"""Tokens to the rows of their experts, and back.

A token with top_k experts has top_k copies. `dispatch` puts the copies in the order of their experts, as
grouped GEMMs take them, and `combine` sums the copies of each token. Both directions, and both gradients, are
gathers: no row is added to by two writers, so results do not depend on their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.moe.placement import check_uncut
from jax_deepgemm.ops.dispatch.api import plan_copies
from jax_deepgemm.ops.dispatch.reference import is_known as is_known
from jax_deepgemm.ops.grouped.checks import as_int32
from jax_deepgemm.ops.rows.api import move_rows, sum_rows
from jax_deepgemm.ops.rows.api import take_quantized as take_quantized
from jax_deepgemm.ops.rows.reference import take

FEWEST_READ_ONCE = 512


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DispatchPlan:
    """Where every copy of every token goes; a pytree of int32 arrays.

    Attributes:
      source: [t * top_k]: which copy a row holds, token * top_k + slot; t * top_k in the tail of empty rows.
      position: [t, top_k]: the row of a copy; t * top_k if it is dropped.
      group_sizes: [num_experts]: rows of each expert.

    Raises nothing: what made it has checked the ids.

    >>> plan = plan_dispatch(jnp.array([[2, 0], [0, -1]]), 3)
    >>> plan.source.tolist(), plan.position.tolist(), plan.group_sizes.tolist()
    ([1, 2, 0, 4], [[2, 0], [1, 4]], [2, 0, 1])
    >>> plan.token.tolist(), plan.kept.tolist()
    ([0, 1, 0, 2], [[True, True], [True, False]])
    """

    source: jax.Array
    position: jax.Array
    group_sizes: jax.Array

    @property
    def token(self) -> jax.Array:
        """[t * top_k]: the token of each row; t in the tail."""
        return self.source // max(self.position.shape[1], 1)

    @property
    def inverse(self) -> jax.Array | None:
        """`position` where kernels had better read each token once for all its copies; None for few tokens,
        as such kernels have a block for some of them, and would leave most SMs idle."""
        tokens = self.position.shape[0]
        return self.position if isinstance(tokens, int) and tokens >= FEWEST_READ_ONCE else None

    @property
    def kept(self) -> jax.Array:
        """bool [t, top_k]: which copies have a row."""
        return self.position < self.source.shape[0]


def plan_dispatch(ids: jax.Array, num_experts: int) -> DispatchPlan:
    """The plan of `dispatch`: copies sorted by expert; those of one expert stay in the order of the tokens.

    >>> import jax.numpy as jnp
    >>> plan = plan_dispatch(jnp.array([[2, 0], [0, -1], [2, 1]]), 3)
    >>> plan.token.tolist(), plan.group_sizes.tolist()
    ([0, 1, 2, 0, 2, 3], [2, 1, 2])

    Args:
      ids: integer [t, top_k]. Copies with an id outside [0, num_experts), as -1, are dropped.
      num_experts: number of experts.

    Returns:
      DispatchPlan of t * top_k rows.

    Raises:
      ValueError: ids that are no [t, top_k] integers.

    On a GPU one launch, whatever the number of copies; deterministic.
    """
    return _plan(ids, num_experts, None)


def plan_capacity(ids: jax.Array, num_experts: int, capacity: int) -> DispatchPlan:
    """The plan with `capacity` rows for every expert, used or not: row (expert, i) is expert * capacity + i.

    The first copies of an expert get its rows; the others, and those without an expert, are dropped. As
    `plan_dispatch` otherwise.
    """
    return _plan(ids, num_experts, capacity)


def _plan(ids: jax.Array, num_experts: int, capacity: int | None) -> DispatchPlan:
    ids = unwrapped(ids)
    if not hasattr(ids, "dtype") or ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        given = (
            f"{np.dtype(ids.dtype).name} {list(ids.shape)}" if hasattr(ids, "dtype") else type(ids).__name__
        )
        raise ValueError(f"dispatch: ids are {given}, need integers [t, top_k]: the experts of each token.")
    ids = as_int32("dispatch", "ids", ids, "[t, top_k]")
    check_uncut("dispatch", ids=ids)
    sizes, source, position = plan_copies(ids, num_experts, capacity)
    return DispatchPlan(source, position, sizes)


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index] along the first dimension; zeros where the index is not in range. For what XLA fuses with its
    neighbours; `move_rows` is for rows that go to memory."""
    return take(jnp.asarray(x), index)[0]


@jax.custom_vjp
def permute(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """take_rows(x, index), where each row of x is taken at most once: row i by inverse[i], or by none."""
    return take_rows(x, index)


def _permute_fwd(x: jax.Array, index: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return take_rows(x, index), inverse


def _permute_bwd(inverse: jax.Array, dy: jax.Array) -> tuple[jax.Array, None, None]:
    return take_rows(dy, inverse), None, None


permute.defvjp(_permute_fwd, _permute_bwd)


def sum_copies(y: jax.Array, position: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """sum_s weights[t, s] * y[position[t, s]] in float32, in the order of the slots, rounded once."""
    if weights is None:
        return sum_rows(y, position)
    total = jnp.zeros((position.shape[0], *y.shape[1:]), jnp.float32)
    for slot in range(position.shape[1]):  # not one gather [t, top_k, h]: XLA fuses these into one loop
        total += take_rows(y, position[:, slot]).astype(jnp.float32) * weights[:, slot, None]
    return total.astype(y.dtype)


@jax.custom_vjp
def _spread(x: jax.Array, plan: DispatchPlan) -> jax.Array:
    return move_rows(x, plan.token, plan.inverse)


def _spread_fwd(x: jax.Array, plan: DispatchPlan) -> tuple[jax.Array, jax.Array]:
    return move_rows(x, plan.token, plan.inverse), plan.position


def _spread_bwd(position: jax.Array, drows: jax.Array) -> tuple[jax.Array, None]:
    return sum_copies(drows, position), None


_spread.defvjp(_spread_fwd, _spread_bwd)


@jax.custom_vjp
def _collect(y: jax.Array, plan: DispatchPlan) -> jax.Array:
    return sum_copies(y, plan.position)


def _collect_fwd(y: jax.Array, plan: DispatchPlan) -> tuple[jax.Array, DispatchPlan]:
    return sum_copies(y, plan.position), plan


def _collect_bwd(plan: DispatchPlan, dout: jax.Array) -> tuple[jax.Array, None]:
    return move_rows(dout, plan.token, plan.inverse), None


_collect.defvjp(_collect_fwd, _collect_bwd)


@jax.custom_vjp
def _collect_weighted(y: jax.Array, weights: jax.Array, plan: DispatchPlan) -> jax.Array:
    return sum_copies(y, plan.position, weights)


def _collect_weighted_fwd(y: jax.Array, weights: jax.Array, plan: DispatchPlan) -> tuple[jax.Array, Any]:
    return sum_copies(y, plan.position, weights), (y, weights, plan)


def _collect_weighted_bwd(kept: Any, dout: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    y, weights, plan = kept
    wide = dout.astype(jnp.float32)
    dy = take_rows(wide, plan.token) * take_rows(weights.reshape(-1), plan.source)[:, None]
    dweights = [
        jnp.sum(wide * take_rows(y, plan.position[:, slot]).astype(jnp.float32), axis=-1)
        for slot in range(plan.position.shape[1])
    ]
    return dy.astype(y.dtype), jnp.stack(dweights, axis=-1).astype(weights.dtype), None


_collect_weighted.defvjp(_collect_weighted_fwd, _collect_weighted_bwd)


def dispatch(x: jax.Array, ids: jax.Array, num_experts: int) -> tuple[jax.Array, DispatchPlan]:
    """Copies of the tokens, sorted by expert.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0], [2.0], [3.0]])
    >>> rows, plan = dispatch(x, jnp.array([[2, 0], [0, -1], [2, 1]]), 3)
    >>> rows[:, 0].tolist(), plan.group_sizes.tolist()
    ([1.0, 2.0, 3.0, 1.0, 3.0, 0.0], [2, 1, 2])
    >>> combine(rows, plan)[:, 0].tolist()
    [2.0, 2.0, 6.0]

    Args:
      x: [t, h], any dtype.
      ids: integer [t, top_k], the experts of each token (`route`). A copy with an id outside [0, num_experts)
        is dropped: it has no row, and counts zero in `combine`.
      num_experts: number of experts.

    Returns:
      (rows [t * top_k, h], plan). The first sum(plan.group_sizes) rows are the copies, expert by expert, in
      the order of the tokens; the rest are zeros. plan.group_sizes is what the grouped GEMMs take.

    Raises:
      ValueError: x and ids that do not fit.

    The gradient sums a token's copies in float32, by gathers. Inside a mesh use it under `jax.shard_map`.
    """
    x, plan = unwrapped(x), plan_dispatch(ids, num_experts)
    _check_tokens("dispatch", "x", x, plan.position.shape[0])
    return spread(x, plan), plan


def spread(x: jax.Array, plan: DispatchPlan) -> jax.Array:
    """Copies of x [t, ..] as the rows of a plan; its gradient sums the copies."""
    x, *rest = same_varying_axes([x, *jax.tree.leaves(plan)])
    return _spread(x, DispatchPlan(*rest))


def spread_weights(weights: jax.Array, plan: DispatchPlan) -> jax.Array:
    """The routing weight of each row of a plan, as `expert_mlp` takes it.

    Args:
      weights: [t, top_k], any floating dtype: the weight of each copy (`route`).
      plan: DispatchPlan of the ids that the weights belong to.

    Returns:
      [t * top_k] in the dtype of weights: the weight of the copy that each row holds, zero in the tail. The
      gradient goes back to the copies, none to those that were dropped.

    Raises:
      TypeError: weights or a plan that hold no arrays.

    >>> import jax.numpy as jnp
    >>> plan = plan_dispatch(jnp.array([[1, 0], [0, -1]]), 2)
    >>> spread_weights(jnp.array([[0.25, 0.75], [0.5, 0.5]]), plan).tolist()
    [0.75, 0.5, 0.25, 0.0]
    """
    weights = unwrapped(weights)
    weights, source, position, _ = same_varying_axes([weights, *jax.tree.leaves(plan)])
    return permute(weights.reshape(-1), source, position.reshape(-1))


def combine(y: jax.Array, plan: DispatchPlan, weights: jax.Array | None = None) -> jax.Array:
    """The sum of each token's rows, weighted.

    out[t] = sum_s weights[t, s] * y[row of copy (t, s)], in float32, slot by slot, rounded once

    Args:
      y: [t * top_k, h], rows as `dispatch` gave them.
      plan: of `dispatch`.
      weights: float32 [t, top_k], or None for ones, e.g. where the experts have applied them.

    Returns:
      [t, h] in y's dtype. Dropped copies count zero; a token without any copy gets zeros. Rows of the tail
      are not read.

    Raises:
      ValueError: shapes that do not fit the plan.

    >>> import jax.numpy as jnp
    >>> rows, plan = dispatch(jnp.array([[1.0], [2.0]]), jnp.array([[1, 0], [0, 1]]), 2)
    >>> combine(rows, plan, jnp.array([[0.25, 0.75], [1.0, 0.5]]))[:, 0].tolist()
    [1.0, 3.0]
    """
    y, weights = unwrapped(y), unwrapped(weights)
    _check_tokens("combine", "y", y, plan.source.shape[0])
    if weights is not None and tuple(weights.shape) != tuple(plan.position.shape):
        raise ValueError(
            f"combine: weights are {list(weights.shape)}, need {list(plan.position.shape)} "
            "as the ids of dispatch."
        )
    if weights is None:
        y, *rest = same_varying_axes([y, *jax.tree.leaves(plan)])
        return _collect(y, DispatchPlan(*rest))
    weights = jnp.where(plan.kept, weights, 0)  # whatever the weight of a dropped copy is, NaN included
    y, weights, *rest = same_varying_axes([y, weights, *jax.tree.leaves(plan)])
    return _collect_weighted(y, weights, DispatchPlan(*rest))


def _check_tokens(where: str, name: str, x: Any, rows: int) -> None:
    if x.ndim != 2 or x.shape[0] != rows:
        raise ValueError(f"{where}: {name} is {list(x.shape)}, need [{rows}, h] for these ids.")
    check_uncut(where, **{name: x})
