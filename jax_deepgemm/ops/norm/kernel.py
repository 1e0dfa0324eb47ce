"""From the operands of an op to the problem that its kernel solves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.norm.family import FAMILY
from jax_deepgemm.ops.norm.problem import NormForm, NormProblem


def _problem(avals_in: Sequence[Any], avals_out: Any, *, form: NormForm, eps: float, **_: Any) -> NormProblem:
    (rows, cols), dtype = avals_in[0].shape, np.dtype(avals_in[0].dtype).name
    kinds = {np.dtype(one.dtype).name for one in avals_in[1 + form.residual :]}
    assert len(kinds) <= 1, kinds
    return NormProblem(rows, cols, form, eps, dtype, *kinds or {dtype})


norm = OpKernel(FAMILY, _problem, ("x", "1", "2", "3", "4"))
