"""From the operands of the ops to the problems that their kernels solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.route.family import FAMILY, RouteProblem
from jax_deepgemm.ops.route.router import Router


def _problem(kind: str, biased: bool = False) -> Callable[..., RouteProblem]:
    def problem(
        avals_in: Sequence[Any], avals_out: Sequence[Any], *, router: Router, **_: Any
    ) -> RouteProblem:
        tokens, experts = avals_in[0].shape
        return RouteProblem(kind, tokens, experts, router, np.dtype(avals_in[0].dtype).name, biased)

    return problem


route = OpKernel(FAMILY, _problem("route"), ("logits",))
route_biased = OpKernel(FAMILY, _problem("route", biased=True), ("logits", "bias"))
route_gradient = OpKernel(FAMILY, _problem("route_gradient"), ("logits", "ids", "dweights"))
