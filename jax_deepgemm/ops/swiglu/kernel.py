"""From the operands of the SwiGLU ops to the problem that their kernels solve, quantising or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.quantize.activation import Activation
from jax_deepgemm.ops.quantize.family import FAMILY
from jax_deepgemm.ops.quantize.kernel import problem_of
from jax_deepgemm.ops.quantize.problem import QuantizeProblem
from jax_deepgemm.ops.swiglu.family import FAMILY as PLAIN
from jax_deepgemm.ops.swiglu.problem import SwigluProblem

PER_ROW = (1, 128)


def _kernel(kind: str, *parts: str, blocked: bool = False) -> OpKernel:
    def problem(
        avals_in: Sequence[Any],
        avals_out: Sequence[Any],
        *,
        scale_format: str,
        transposed: bool,
        activation: Activation,
        square_t: bool,
        **_: Any,
    ) -> QuantizeProblem:
        return problem_of(
            kind,
            avals_in,
            avals_out,
            block=PER_ROW,
            scale_format=scale_format,
            transposed=transposed,
            limited=not blocked and len(avals_in) > len(parts),
            weighted="weight" in parts,
            activation=activation,
            blocked=blocked,
            square_t=square_t,
        )

    return OpKernel(FAMILY, problem, (*parts, "blocks" if blocked else "limit"))


swiglu = _kernel("swiglu", "h")
swiglu_weighted = _kernel("swiglu", "h", "weight")
swiglu_grad = _kernel("swiglu_grad", "h", "dact")
swiglu_grad_weighted = _kernel("swiglu_grad", "h", "weight", "dact")
swiglu_blocked = _kernel("swiglu", "h", blocked=True)
swiglu_weighted_blocked = _kernel("swiglu", "h", "weight", blocked=True)
swiglu_grad_blocked = _kernel("swiglu_grad", "h", "dact", blocked=True)
swiglu_grad_weighted_blocked = _kernel("swiglu_grad", "h", "weight", "dact", blocked=True)


def _plain(kind: str, *parts: str) -> OpKernel:
    def problem(
        avals_in: Sequence[Any], avals_out: Sequence[Any], *, activation: Activation, **_: Any
    ) -> SwigluProblem:
        width = (avals_in[-1] if kind == "grad" else avals_out[0]).shape[-1]
        lines = avals_out[0].shape[: len(avals_out[0].shape) - (2 if kind == "grad" else 1)]
        return SwigluProblem(
            kind=kind,
            rows=math.prod(lines),
            width=width,
            x=np.dtype(avals_in[0].dtype).name,
            weighted="weight" in parts,
            activation=activation,
        )

    return OpKernel(PLAIN, problem, parts)


plain_act = _plain("act", "h")
plain_act_weighted = _plain("act", "h", "weight")
plain_grad = _plain("grad", "h", "dact")
plain_grad_weighted = _plain("grad", "h", "weight", "dact")
