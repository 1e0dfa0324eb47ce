"""The plan of a dispatch as a loop over copies."""

from __future__ import annotations

import numpy as np


def plan(
    ids: np.ndarray, experts: int, capacity: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sizes [experts], source [rows], position [t, s]) of ids [t, s], see `ops.dispatch.api.plan_copies`."""
    flat = ids.reshape(-1)
    copies = flat.size
    known = (flat >= 0) & (flat < experts)
    order = np.argsort(np.where(known, flat, experts), kind="stable")[: int(known.sum())]
    sizes = np.bincount(flat[known], minlength=experts)
    rank = np.arange(order.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    if capacity is None:
        rows, row = copies, np.arange(order.size)
    else:
        rows, row = experts * capacity, flat[order].astype(np.int64) * capacity + rank
        order, row = order[rank < capacity], row[rank < capacity]
        sizes = np.minimum(sizes, capacity)
    source, position = np.full(rows, copies), np.full(copies, rows)
    source[row], position[order] = order, row
    return sizes, source, position.reshape(ids.shape)
