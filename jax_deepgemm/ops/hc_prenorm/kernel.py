"""From the operands of the op to the problem that its kernel solves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.hc_prenorm.family import FAMILY, HcPrenormProblem


def _problem(
    avals_in: Sequence[Any], avals_out: Sequence[Any], *, num_splits: int = 0, **_: Any
) -> HcPrenormProblem:
    (m, k), (n, _) = (one.shape for one in avals_in)
    return HcPrenormProblem(m, n, k, num_splits)


hc_prenorm = OpKernel(FAMILY, _problem, ("a", "b"))
