"""From the operands of the ops that take rows to the problem that their kernel solves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.rows.family import FAMILY
from jax_deepgemm.ops.rows.problem import RowsProblem


def _problem(avals_in: Sequence[Any], avals_out: Sequence[Any], **_: Any) -> RowsProblem:
    *given, index = avals_in
    assert index.dtype == np.int32, index
    sizes = [x.shape[1] * np.dtype(x.dtype).itemsize for x in given]
    return RowsProblem(index.shape[0], given[0].shape[0], *sizes)


def _copies(avals_in: Sequence[Any], avals_out: Sequence[Any], **_: Any) -> RowsProblem:
    x, index, position = avals_in
    assert index.dtype == position.dtype == np.int32, (index, position)
    row_bytes = x.shape[1] * np.dtype(x.dtype).itemsize
    return RowsProblem(index.shape[0], x.shape[0], row_bytes, copies=position.shape[1])


def _sums(avals_in: Sequence[Any], avals_out: Sequence[Any], **_: Any) -> RowsProblem:
    x, index = avals_in
    assert index.dtype == np.int32, index
    dtype = np.dtype(x.dtype)
    rows, slots = index.shape
    return RowsProblem(rows, x.shape[0], x.shape[1] * dtype.itemsize, slots=slots, dtype=dtype.name)


take = OpKernel(FAMILY, _problem, ("x", "index"))
take_scaled = OpKernel(FAMILY, _problem, ("x", "scales", "index"))
copies = OpKernel(FAMILY, _copies, ("x", "index", "position"))
sums = OpKernel(FAMILY, _sums, ("x", "index"))
