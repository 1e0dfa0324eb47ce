"""From the operands of the quantising ops to the problem that their kernels solve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.quantize.activation import SILU, Activation
from jax_deepgemm.ops.quantize.array import Block
from jax_deepgemm.ops.quantize.family import FAMILY
from jax_deepgemm.ops.quantize.problem import TILE, QuantizeProblem


def problem_of(
    kind: str,
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    block: Block,
    scale_format: str,
    transposed: bool,
    limited: bool = False,
    weighted: bool = False,
    min_amax: float = 0.0,
    activation: Activation = SILU,
    blocked: bool = False,
    indexed: bool = False,
    copied: int = 0,
    square_t: bool = False,
) -> QuantizeProblem:
    """The problem of a call whose first operand is what is read, and whose first result is FP8."""
    *batches, rows, cols = avals_out[0].shape
    return QuantizeProblem(
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
        weighted=weighted,
        activation=activation,
        batches=batches[0] if batches else 1,
        blocks=avals_out[2].shape[1] // TILE if blocked else 0,
        indexed=indexed,
        copied=copied,
        square_t=square_t,
    )


def _quantize(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    block: Block,
    scale_format: str,
    transposed: bool = False,
    min_amax: float = 0.0,
    square_t: bool = False,
    **_: Any,
) -> QuantizeProblem:
    return problem_of(
        "quantize",
        avals_in,
        avals_out,
        block=block,
        scale_format=scale_format,
        transposed=transposed,
        square_t=square_t,
        limited=len(avals_in) > 1,
        min_amax=min_amax,
    )


quantize = OpKernel(FAMILY, _quantize, ("x", "limit"))
"""x [rows, cols](, the row from which on x counts as zeros)."""


def _of_groups(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    block: Block,
    scale_format: str,
    **form: Any,
) -> QuantizeProblem:
    names = ("transposed", "indexed", "blocked", "square_t")
    given = {name: form[name] for name in names if name in form}
    return problem_of("quantize", avals_in, avals_out, block=block, scale_format=scale_format, **given)


quantize_indexed = OpKernel(FAMILY, _of_groups, ("x", "index", "blocks"))
"""x [t, cols], the row of x for each row(, the table of row blocks)."""


def _copies(
    avals_in: Sequence[Any], avals_out: Sequence[Any], *, block: Block, scale_format: str, **_: Any
) -> QuantizeProblem:
    form: dict[str, Any] = {"transposed": False, "indexed": True, "copied": avals_in[0].shape[0]}
    return problem_of("quantize", avals_in, avals_out, block=block, scale_format=scale_format, **form)


quantize_copies = OpKernel(FAMILY, _copies, ("x", "index", "position"))
"""x [t, cols], the row of x for each row, and the rows for each row of x."""
quantize_blocked = OpKernel(FAMILY, _of_groups, ("x", "blocks"))
"""x [rows, cols], the table of row blocks."""
