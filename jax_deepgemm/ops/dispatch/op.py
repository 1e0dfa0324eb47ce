"""The plan of a dispatch as an op. The order of copies counts over all of them, so nothing is cut: each
device makes the whole plan, and takes of it what it is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from jax_deepgemm.core.declaration import Dims
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import pieces_of_whole
from jax_deepgemm.ops.dispatch import reference


def rows_of(copies: Any, experts: int, capacity: int | None) -> Any:
    """Rows of a plan."""
    return copies if capacity is None else experts * capacity


def _result(ids: Dims, *, experts: int, capacity: int | None = None) -> list[tuple[Dims, Any]]:
    rows = rows_of(ids[0] * ids[1], experts, capacity)
    return [(shape, np.dtype(np.int32)) for shape in ((experts,), (rows,), ids)]


PLAN = Op(
    "plan_dispatch",
    "t s -> e, r, u v",  # u and v are t and s, whose cuts would be cuts of the order
    _result,
    reference.plan,
    spmd=pieces_of_whole("e", "r", "u", "v"),
    kernel=LazyKernel("jax_deepgemm.ops.dispatch.kernel", "plan"),
)
