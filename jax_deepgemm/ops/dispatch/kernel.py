"""From the ids of a dispatch to the problem that its kernel solves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.dispatch.family import FAMILY
from jax_deepgemm.ops.dispatch.problem import DispatchProblem


def _problem(
    avals_in: Sequence[Any], avals_out: Sequence[Any], *, experts: int, capacity: int = 0, **_: Any
) -> DispatchProblem:
    assert avals_in[0].dtype == np.int32, avals_in
    return DispatchProblem(math.prod(avals_in[0].shape), experts, capacity)


plan = OpKernel(FAMILY, _problem, ("ids",))
