"""The CUDA side of the quantising ops: operand types -> QuantizeProblem -> LaunchPlan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.launch import LaunchPlan
from jax_deepgemm.quantization.array import Block
from jax_deepgemm.sm90.chip import Chip
from jax_deepgemm.sm90.quantize import QuantizeProblem, quantize_plan

Batch = tuple[bool, ...] | None


def quantize(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: Batch,
    chip: Chip,
    block: Block,
    scale_format: str,
    transposed: bool = False,
    min_amax: float = 0.0,
    **_: Any,
) -> LaunchPlan:
    """The plan of `quantize`, `quantize_both` and `quantize_weight`: operands (x[, rows])."""
    return plan(
        "quantize",
        ["x"],
        avals_in,
        avals_out,
        batch=batch,
        chip=chip,
        block=block,
        scale_format=scale_format,
        transposed=transposed,
        min_amax=min_amax,
    )


def plan(
    kind: str,
    names: list[str],
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: Batch,
    chip: Chip,
    block: Block,
    scale_format: str,
    transposed: bool,
    min_amax: float = 0.0,
) -> LaunchPlan:
    """The plan of a quantising op whose operands are `names` and perhaps the row limit."""
    limited = len(avals_in) > len(names)
    carried = dict(zip([*names, "limit"], batch or (False,) * len(avals_in), strict=False))
    *batches, rows, cols = avals_out[0].shape
    problem = QuantizeProblem(
        kind=kind,
        rows=rows,
        cols=cols,
        x=np.dtype(avals_in[0].dtype).name,
        fp8=np.dtype(avals_out[0].dtype).name,
        block=block,
        transposed=transposed,
        ue8m0=scale_format == "ue8m0",
        min_amax=min_amax,
        limited=limited,
        weighted="weight" in names,
        batches=batches[0] if batches else 1,
    )
    return quantize_plan(problem, chip, carried)
