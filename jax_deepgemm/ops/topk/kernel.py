"""From the operands of the ops to the problem that their kernel solves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.topk.family import FAMILY
from jax_deepgemm.ops.topk.problem import TopkProblem


def _problem(
    avals_in: Sequence[Any], avals_out: Sequence[Any], *, k: int, by_index: bool, **_: Any
) -> TopkProblem:
    x, *windows = avals_in
    assert all(one.dtype == np.int32 for one in windows), windows
    rows, columns = x.shape
    return TopkProblem(rows, columns, k, np.dtype(x.dtype).name, bool(windows), len(avals_out) > 1, by_index)


topk = OpKernel(FAMILY, _problem, ("x", "start", "end"))
