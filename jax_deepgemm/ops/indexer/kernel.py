"""From the operands of the ops to the problem that their kernel solves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.indexer.family import FAMILY, LogitsProblem

_DTYPES = {"float8_e4m3fn": "e4m3", "bfloat16": "bf16"}


def _problem(
    avals_in: Sequence[Any], avals_out: Sequence[Any], *, columns: int | None = None, **_: Any
) -> LogitsProblem:
    q, k, (out,) = avals_in[0], avals_in[1], avals_out
    return LogitsProblem(
        tokens=q.shape[0],
        keys=k.shape[0],
        columns=out.shape[-1],
        heads=q.shape[1],
        depth=q.shape[2],
        dtype=_DTYPES[np.dtype(q.dtype).name],
        out=np.dtype(out.dtype).name,
        compressed=columns is not None,
        batches=math.prod(out.shape[:-2]),
    )


scaled = OpKernel(FAMILY, _problem, ("q", "k", "scales", "weights", "start", "end"))
plain = OpKernel(FAMILY, _problem, ("q", "k", "weights", "start", "end"))
