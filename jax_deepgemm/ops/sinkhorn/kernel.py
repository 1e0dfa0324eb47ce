"""From the operands of the ops to the problems that their kernels solve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.sinkhorn.family import FAMILY, SinkhornProblem


def _problem(
    avals_in: Sequence[Any], avals_out: Sequence[Any], *, kind: str, iterations: int, eps: float, **_: Any
) -> SinkhornProblem:
    matrices, n, _columns = avals_in[0].shape
    return SinkhornProblem(kind, matrices, n, iterations, eps)


sinkhorn = OpKernel(FAMILY, _problem, ("logits", "by"))
