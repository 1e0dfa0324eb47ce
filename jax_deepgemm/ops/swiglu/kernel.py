"""From the operands of the SwiGLU ops to the problem that the quantising kernels solve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.quantize.activation import Activation
from jax_deepgemm.ops.quantize.family import FAMILY
from jax_deepgemm.ops.quantize.kernel import problem_of
from jax_deepgemm.ops.quantize.problem import QuantizeProblem

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
