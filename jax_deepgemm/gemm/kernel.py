"""The CUDA side of the dense ops: operand types -> GemmProblem -> GemmConfig -> LaunchPlan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_deepgemm.core.launch import LaunchPlan
from jax_deepgemm.jit.toolchain import read_settings, say
from jax_deepgemm.sm90.chip import Chip, with_sms
from jax_deepgemm.sm90.config import GemmConfig, GemmProblem
from jax_deepgemm.sm90.cost import choose, cost
from jax_deepgemm.sm90.plan import GemmOperands, MatrixOperand, gemm_plan
from jax_deepgemm.sm90.tuning import lookup

_TYPES = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2", "bfloat16": "bf16"}


def type_name(aval: Any) -> str:
    """The element type as problems name it."""
    return _TYPES[np.dtype(aval.dtype).name]


def announce(problem: Any, chosen: GemmConfig, given: bool, chip: Chip, cost: Callable[..., Any]) -> None:
    """Prints a configuration and where it comes from: the caller, a tuning file or the cost model."""
    if read_settings().print_configs:
        origin = "given" if given else lookup(problem, chip) or cost(problem, chosen, chip)
        say(f"{problem}: {chosen}, {origin}")


def _config(problem: GemmProblem, config: GemmConfig | None, chip: Chip) -> GemmConfig:
    chosen = config or choose(problem, chip)
    announce(problem, chosen, config is not None, chip, cost)
    return chosen


def fp8_problem(
    avals_in: Sequence[Any], avals_out: Sequence[Any], *, batch: tuple[bool, ...] | None, **_: Any
) -> GemmProblem:
    """The problem of operands (a, a scales, b, b scales[, c]) as the kernel sees them: padded for TMA."""
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
        b_scales="vector" if per_row else "block",
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


@dataclass(frozen=True)
class GemmKernel:
    """The kernel side of one op, dense or grouped.

    Attributes:
      parts: what its operands are, in order; the last, C, may be missing.
      problem: (avals_in, avals_out, batch=, **params) -> GemmProblem or GroupedProblem.
      plan: (problem, config or None, chip, operands by part) -> LaunchPlan.
    """

    parts: tuple[str, ...]
    problem: Callable[..., Any]
    plan: Callable[[Any, GemmConfig | None, Chip, dict[str, MatrixOperand]], LaunchPlan]

    def __call__(
        self,
        avals_in: Sequence[Any],
        avals_out: Sequence[Any],
        *,
        batch: tuple[bool, ...] | None,
        chip: Chip,
        config: GemmConfig | None = None,
        num_sms: int | None = None,
        **params: Any,
    ) -> LaunchPlan:
        """The plan of the op."""
        problem = self.problem(avals_in, avals_out, batch=batch, **params)
        operands = {
            part: MatrixOperand(i, tuple(aval.shape))
            for i, (part, aval) in enumerate(zip(self.parts, avals_in))
        }
        return self.plan(problem, config, with_sms(chip, num_sms), operands)


def _dense_plan(
    problem: GemmProblem, config: GemmConfig | None, chip: Chip, operands: dict[str, MatrixOperand]
) -> LaunchPlan:
    return gemm_plan(problem, _config(problem, config, chip), chip, GemmOperands(**operands))


fp8_gemm = GemmKernel(("a", "a_scales", "b", "b_scales", "c"), fp8_problem, _dense_plan)
"""The plan of `fp8_gemm_block`, `fp8_gemm_row` and their `_add` forms."""
bf16_gemm = GemmKernel(("a", "b", "c"), bf16_problem, _dense_plan)
"""The plan of `bf16_gemm` and `bf16_gemm_add`."""
