"""The CUDA side of SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax_deepgemm.core.launch import LaunchPlan
from jax_deepgemm.quantization.kernel import Batch, plan
from jax_deepgemm.sm90.chip import Chip

PER_ROW = (1, 128)


def swiglu(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    names: list[str],
    batch: Batch,
    chip: Chip,
    scale_format: str,
    transposed: bool,
    **_: Any,
) -> LaunchPlan:
    """The plan of `swiglu_quantize` and its gradient: operands `names` and perhaps the row limit."""
    kind = "swiglu_grad" if "dact" in names else "swiglu"
    return plan(
        kind,
        names,
        avals_in,
        avals_out,
        batch=batch,
        chip=chip,
        block=PER_ROW,
        scale_format=scale_format,
        transposed=transposed,
    )
