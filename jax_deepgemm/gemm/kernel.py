"""The CUDA side of the dense ops: operand types -> GemmProblem -> GemmConfig -> LaunchPlan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jax_deepgemm.core.launch import LaunchPlan
from jax_deepgemm.jit.toolchain import read_settings, say
from jax_deepgemm.sm90.chip import Chip
from jax_deepgemm.sm90.config import GemmConfig, GemmProblem
from jax_deepgemm.sm90.cost import choose, cost
from jax_deepgemm.sm90.plan import GemmOperands, MatrixOperand, gemm_plan

_TYPES = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2", "bfloat16": "bf16"}


def type_name(aval: Any) -> str:
    """The element type as problems name it."""
    return _TYPES[np.dtype(aval.dtype).name]


def _chip_for(chip: Chip, num_sms: int | None) -> Chip:
    return chip if num_sms is None else replace(chip, num_sms=min(num_sms, chip.num_sms))


def _config(problem: GemmProblem, config: GemmConfig | None, chip: Chip) -> GemmConfig:
    """The caller's configuration, or the cost model's."""
    chosen = config or choose(problem, chip)
    if read_settings().print_configs:
        say(f"{problem}: {chosen}, {'given' if config else cost(problem, chosen, chip)}")
    return chosen


def fp8_problem(
    avals_in: Sequence[Any], avals_out: Sequence[Any], batch: tuple[bool, ...] | None
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


def fp8_gemm(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: tuple[bool, ...] | None,
    chip: Chip,
    config: GemmConfig | None = None,
    num_sms: int | None = None,
    **_: Any,
) -> LaunchPlan:
    """The plan of `fp8_gemm_block`, `fp8_gemm_row` and their `_add` forms."""
    chip = _chip_for(chip, num_sms)
    problem = fp8_problem(avals_in, avals_out, batch)
    a, sa, b, sb, *c = (MatrixOperand(i, tuple(x.shape)) for i, x in enumerate(avals_in))
    operands = GemmOperands(a, b, sa, sb, c[0] if c else None)
    return gemm_plan(problem, _config(problem, config, chip), chip, operands)


def bf16_problem(
    avals_in: Sequence[Any], avals_out: Sequence[Any], batch: tuple[bool, ...] | None, layout: str
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


def bf16_gemm(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: tuple[bool, ...] | None,
    chip: Chip,
    layout: str,
    config: GemmConfig | None = None,
    num_sms: int | None = None,
    **_: Any,
) -> LaunchPlan:
    """The plan of `bf16_gemm` and `bf16_gemm_add`."""
    chip = _chip_for(chip, num_sms)
    problem = bf16_problem(avals_in, avals_out, batch, layout)
    a, b, *c = (MatrixOperand(i, tuple(x.shape)) for i, x in enumerate(avals_in))
    operands = GemmOperands(a, b, c=c[0] if c else None)
    return gemm_plan(problem, _config(problem, config, chip), chip, operands)
