"""From the operands of an einsum to the problem that the dense kernels solve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.einsum.form import Form
from jax_deepgemm.ops.gemm.family import FAMILY
from jax_deepgemm.ops.gemm.kernel import type_name
from jax_deepgemm.ops.gemm.problem import GemmProblem


@dataclass(frozen=True)
class EinsumKernel(OpKernel):
    """A dense kernel of which the einsum's form says where the batch is.

    Attributes:
      b_at: where b stands among the operands.
    """

    b_at: int = 1

    def carried(
        self, avals_in: Sequence[Any], batch: tuple[bool, ...] | None, **params: Any
    ) -> tuple[bool, ...]:
        return _carried(_as_called(params["form"], batch, self.b_at), avals_in, self.b_at)


def _as_called(form: Form, batch: tuple[bool, ...] | None, b_at: int) -> Form:
    return form if batch is None else form.mapped((batch[0], batch[b_at]))


def _carried(form: Form, avals_in: Sequence[Any], b_at: int) -> tuple[bool, ...]:
    """For each operand, whether it has a dimension that is the kernel's batch, or its runs."""
    a, b, d = ("h" in order or "r" in order for order in form.orders)
    return (a,) * b_at + (b,) * b_at + (d,) * (len(avals_in) - 2 * b_at)


def _problem(
    b_at: int, avals_in: Sequence[Any], avals_out: Sequence[Any], batch: tuple[bool, ...] | None, form: Form
) -> GemmProblem:
    form = _as_called(form, batch, b_at)
    a, b, out = avals_in[0], avals_in[b_at], avals_out[0]
    order_a, order_b, _d = form.orders
    n = form.size("n", form.d, out.shape)
    scales = avals_in[3] if b_at == 2 else None
    per_row = scales is not None and scales.shape[order_b.index("n")] == n and n > 1
    runs = a.shape[order_a.index("r")] if "r" in order_a else 1
    carried = _carried(form, avals_in, b_at) if "h" in form.stored else ()
    return GemmProblem(
        m=form.size("m", form.d, out.shape),
        n=n,
        k=a.shape[order_a.index("k")],
        a=type_name(a),
        b=type_name(b),
        layout=form.layout,
        out=np.dtype(out.dtype).name,
        add_c=len(avals_in) > 2 * b_at,
        b_scales="none" if scales is None else "vector" if per_row else "block",
        batches=form.size("h", form.d, out.shape),
        batched=carried,
        stored="" if form.leads else form.stored,
        runs=runs,
    )


def bf16_problem(
    avals_in: Sequence[Any], avals_out: Sequence[Any], *, batch: tuple[bool, ...] | None, form: Form, **_: Any
) -> GemmProblem:
    """The problem of collapsed operands (a, b[, c])."""
    return _problem(1, avals_in, avals_out, batch, form)


def fp8_problem(
    avals_in: Sequence[Any], avals_out: Sequence[Any], *, batch: tuple[bool, ...] | None, form: Form, **_: Any
) -> GemmProblem:
    """The problem of collapsed operands (a, a scales, b, b scales[, c])."""
    return _problem(2, avals_in, avals_out, batch, form)


bf16_einsum = EinsumKernel(FAMILY, bf16_problem, ("a", "b", "c"))
"""The kernel of the ops of `bf16_einsum`."""
fp8_einsum = EinsumKernel(FAMILY, fp8_problem, ("a", "a_scales", "b", "b_scales", "c"), b_at=2)
"""The kernel of the ops of `fp8_einsum`."""
