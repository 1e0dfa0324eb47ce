"""From the operands of the op to the problem that its chain solves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.experts.family import FAMILY, ExpertsProblem
from jax_deepgemm.ops.gemm.kernel import type_name


def _problem(
    avals_in: Sequence[Any], avals_out: Sequence[Any], *, expected_m: int | None = None, **_: Any
) -> ExpertsProblem:
    x, ids, _weights, w13, _, w2, _ = avals_in
    (tokens, slots), experts = ids.shape, w13.shape[0]
    rows = tokens * slots
    return ExpertsProblem(
        tokens=tokens,
        slots=slots,
        hidden=x.shape[1],
        inner=w2.shape[2],
        experts=experts,
        expected=min(expected_m or max(1, rows // experts), rows),
        w13=type_name(w13),
        w2=type_name(w2),
        x=np.dtype(x.dtype).name,
    )


layer = OpKernel(FAMILY, _problem, ("x", "ids", "weights", "w13", "w13_scales", "w2", "w2_scales"))
"""x [t, h], ids [t, s], weights [t, s], w13 [g, 2 i, h], scales, w2 [g, h, i], scales."""
