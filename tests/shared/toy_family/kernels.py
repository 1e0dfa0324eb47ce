"""The kernel, for compute capability 8.0 and all later ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Kernels, Operands, OpKernel
from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Result, Scalar
from jax_deepgemm.jit import KernelSource, compile_kernel
from tests.shared.toy_family.family import FAMILY, ScaleConfig, ScaleProblem

_TEXT = """\
extern "C" __global__ void {name}(const float* x, const float* w, float* y, int count, int cols) {{
  for (int i = blockIdx.x * {threads} + threadIdx.x; i < count; i += gridDim.x * {threads})
    y[i] = x[i] * w[i % cols];
}}
"""


@dataclass(frozen=True)
class Microseconds:
    total: float

    def __str__(self) -> str:
        return f"{self.total:.2f} us"


def _cost(p: ScaleProblem, c: ScaleConfig, chip: Chip) -> Microseconds:
    waves = -(-p.rows * p.cols // (c.threads * chip.num_sms))
    return Microseconds(1.0 + waves * c.threads / 1024)


def _broken_rules(p: ScaleProblem, c: ScaleConfig, chip: Chip) -> list[str]:
    legal = c.threads in (128, 256, 512, 1024)
    return [] if legal else [f"threads is {c.threads}, must be 128, 256, 512 or 1024"]


def _source(p: ScaleProblem, c: ScaleConfig) -> KernelSource:
    name = f"jdg_toy_scale_t{c.threads}"
    return KernelSource(name, _TEXT.format(name=name, threads=c.threads), (("threads", c.threads),))


def _plan(p: ScaleProblem, c: ScaleConfig, chip: Chip, given: Operands) -> LaunchPlan:
    kernel = compile_kernel(_source(p, c), arch=chip.arch)
    numbers = (Scalar(p.rows * p.cols, "int32"), Scalar(p.cols, "int32"))
    params = (Operand(given["x"].index), Operand(given["w"].index), Result(0), *numbers)
    blocks = min(chip.num_sms, -(-p.rows * p.cols // c.threads))
    return LaunchPlan((Launch(kernel, (blocks, 1, 1), c.threads, params),), label=str(p))


KERNELS = Kernels[ScaleProblem, ScaleConfig](
    config=ScaleConfig,
    candidates=lambda p, chip: [ScaleConfig(threads) for threads in (128, 256, 1024)],
    cost=_cost,
    broken_rules=_broken_rules,
    sources=lambda p, c: [_source(p, c)],
    plan=_plan,
)


def _problem(avals_in: Sequence[Any], avals_out: Sequence[Any], **_: Any) -> ScaleProblem:
    return ScaleProblem(*avals_in[0].shape)


scale = OpKernel(FAMILY, _problem, ("x", "w"))
