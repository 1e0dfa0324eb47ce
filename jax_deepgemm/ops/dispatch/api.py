"""The plan of a dispatch, by a kernel where there is one."""

from __future__ import annotations

import jax

from jax_deepgemm.ops.dispatch import reference
from jax_deepgemm.ops.dispatch.op import PLAN, rows_of
from jax_deepgemm.ops.dispatch.problem import MOST_EXPERTS, MOST_ROWS


def plan_copies(
    ids: jax.Array, num_experts: int, capacity: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Copies of tokens in the order of their experts, those of one expert in the order of the tokens.

    >>> import jax.numpy as jnp
    >>> sizes, source, position = plan_copies(jnp.array([[2, 0], [0, -1]]), 3)
    >>> sizes.tolist(), source.tolist(), position.tolist()
    ([2, 0, 1], [1, 2, 0, 4], [[2, 0], [1, 4]])
    >>> sizes, source, position = plan_copies(jnp.array([[2, 0], [0, -1]]), 3, capacity=1)
    >>> sizes.tolist(), source.tolist(), position.tolist()
    ([1, 0, 1], [1, 4, 0], [[2, 0], [3, 3]])

    Args:
      ids: int32 [t, top_k]. Copies with an id outside [0, num_experts) are dropped.
      num_experts: number of experts.
      capacity: rows of every expert, used or not: row (expert, i) is expert * capacity + i, its first copies
        get them, and the others are dropped. None: rows of an expert follow those of the one before.

    Returns:
      (rows that each expert uses [num_experts], the copy of each row [rows], the row of each copy
      [t, top_k]), int32. rows is t * top_k, or num_experts * capacity. A copy is token * top_k + slot;
      t * top_k is none. A copy that is dropped has row `rows`.

    Raises nothing: callers have checked the ids. One launch on a GPU, deterministic. Sizes that are symbols,
    and more copies or experts than the kernel takes, run the plain form.
    """
    copies = ids.shape[0] * ids.shape[1]
    known = all(map(reference.is_known, (*ids.shape, 0 if capacity is None else capacity)))
    small = known and max(copies, rows_of(copies, num_experts, capacity)) <= MOST_ROWS
    if not (small and 0 < num_experts <= MOST_EXPERTS and capacity != 0):
        return tuple(reference.plan(ids, experts=num_experts, capacity=capacity))  # type: ignore[return-value]
    limit = {} if capacity is None else {"capacity": capacity}
    return tuple(PLAN(ids, experts=num_experts, fallback="reference", **limit))  # type: ignore[return-value]
