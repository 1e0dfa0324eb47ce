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
    **_: Any,
) -> LaunchPlan:
    """The plan of `quantize`, `quantize_both` and `quantize_weight`: operands (x[, rows])."""
    return plan("quantize", ["x"], avals_in, avals_out, batch, chip, block, scale_format, transposed)


def plan(
    kind: str,
    names: list[str],
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    batch: Batch,
    chip: Chip,
    block: Block,
    scale_format: str,
    transposed: bool,
) -> LaunchPlan:
    """The plan of a quantising op whose operands are `names` and perhaps the row limit."""
    limited = len(avals_in) > len(names)
    carried = dict(zip([*names, "limit"], batch or (False,) * len(avals_in), strict=False))
    *batches, rows, cols = avals_out[0].shape
    problem = QuantizeProblem(
        kind,
        rows,
        cols,
        np.dtype(avals_in[0].dtype).name,
        np.dtype(avals_out[0].dtype).name,
        block,
        transposed,
        scale_format == "ue8m0",
        limited,
        "weight" in names,
        batches[0] if batches else 1,
    )
    return quantize_plan(problem, chip, carried)
