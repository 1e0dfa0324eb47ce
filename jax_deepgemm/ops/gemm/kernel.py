"""From the operands of the dense ops to the problem that their kernels solve."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.gemm.family import FAMILY
from jax_deepgemm.ops.gemm.finish import Finish
from jax_deepgemm.ops.gemm.problem import GemmProblem
from jax_deepgemm.ops.gemm.reference import SCALE_BLOCK

_TYPES = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2", "bfloat16": "bf16"}


def type_name(aval: Any) -> str:
    """The element type as problems name it."""
    return _TYPES[np.dtype(aval.dtype).name]


def scales_of(per_row: bool, step: int) -> str:
    """The scales of B as problems name them."""
    return ("vector" if per_row else "block") + ("" if step == SCALE_BLOCK else f"_{step}")


def fp8_problem(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: tuple[bool, ...] | None,
    step: int = SCALE_BLOCK,
    **_: Any,
) -> GemmProblem:
    """The problem of operands (a, a scales, b, b scales[, c]) as the kernel sees them, padded for TMA.

    A scale is for `step` of k.
    """
    a, _, b, sb = avals_in[:4]
    *batches, m, n = avals_out[0].shape
    per_row = sb.shape[-2] == n and n > 1
    return GemmProblem(
        m=m,
        n=n,
        k=a.shape[-1],
        a=type_name(a),
        b=type_name(b),
        out=np.dtype(avals_out[0].dtype).name,
        add_c=len(avals_in) > 4,
        b_scales=scales_of(per_row, step),
        batches=batches[0] if batches else 1,
        batched=batch or (),
    )


def bf16_problem(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: tuple[bool, ...] | None,
    layout: str,
    **_: Any,
) -> GemmProblem:
    """The problem of operands (a, b[, c]) stored as `layout` says."""
    a = avals_in[0]
    *batches, m, n = avals_out[0].shape
    return GemmProblem(
        m=m,
        n=n,
        k=a.shape[-1 if layout[0] == "n" else -2],
        a="bf16",
        b="bf16",
        layout=layout,
        out=np.dtype(avals_out[0].dtype).name,
        add_c=len(avals_in) > 2,
        b_scales="none",
        batches=batches[0] if batches else 1,
        batched=batch or (),
    )


fp8_gemm = OpKernel(FAMILY, fp8_problem, ("a", "a_scales", "b", "b_scales", "c"))
"""The kernel of `fp8_gemm_block`, `fp8_gemm_row` and their `_add` forms."""
bf16_gemm = OpKernel(FAMILY, bf16_problem, ("a", "b", "c"))
"""The kernel of `bf16_gemm` and `bf16_gemm_add`."""


class Finished(OpKernel):
    """Of an op with further operands behind those of the product (finished.py)."""

    def plan(self, avals_in: Sequence[Any], avals_out: Sequence[Any], **params: Any) -> Any:
        more = more_parts(params["finish"])
        whole = dataclasses.replace(self, parts=(*self.parts, *more))
        return super(Finished, whole).plan(avals_in, avals_out, **params)


def more_parts(finish: Finish) -> tuple[str, ...]:
    """What the operands behind those of the product are; the last one may be missing."""
    given = [name for name in ("alpha", "bias") if getattr(finish, name)]
    return (*given, "d" if finish.heads is not None else "c")


def finished_problem(product: Any, count: int) -> Any:
    """The problem of an op whose product, dense or grouped, has `count` operands."""

    def problem(avals_in: Sequence[Any], avals_out: Sequence[Any], *, finish: Finish, **params: Any) -> Any:
        *lead, columns = avals_out[0].shape
        dtype = np.dtype("bfloat16") if finish.quantized else avals_out[0].dtype
        sums = jax.ShapeDtypeStruct((*lead, finish.taken(columns)), dtype)
        addend = len(avals_in) == count + len(more_parts(finish)) and finish.heads is None
        return dataclasses.replace(
            product(avals_in[:count], [sums], **params), finish=finish, gated=finish.apart, add_c=addend
        )

    return problem


fp8_finished = Finished(FAMILY, finished_problem(fp8_problem, 4), ("a", "a_scales", "b", "b_scales"))
bf16_finished = Finished(FAMILY, finished_problem(bf16_problem, 2), ("a", "b"))
"""The kernels of the ops of finished.py."""
