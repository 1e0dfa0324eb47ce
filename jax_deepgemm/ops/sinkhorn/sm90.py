"""Small doubly stochastic matrices: problem -> source text and LaunchPlan;
include/jax_deepgemm/sinkhorn/sinkhorn.cuh says how."""

from __future__ import annotations

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Kernels, Operands
from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Result, Scalar
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.ops.sinkhorn.family import MOST_MATRICES, SinkhornProblem, beyond

THREADS = 64

_TEXT = """\
#include <jax_deepgemm/sinkhorn/sinkhorn.cuh>

extern "C" __global__ void __launch_bounds__({threads}) {name}(
    const float* logits, {by}float* result, int count, int steps, float eps) {{
  jdg::{kind}<{n}>(logits, {by_given}result, count, steps, eps);
}}
"""


def steps_of(p: SinkhornProblem) -> int:
    """Divisions by sums: of columns, and of rows between them."""
    return 2 * p.iterations - 1


def shared_memory(p: SinkhornProblem) -> int:
    """Bytes of shared memory: the sums of all steps, where the gradient needs them."""
    return 4 * THREADS * p.n * steps_of(p) if p.kind == "sinkhorn_gradient" else 0


def kernel_source(p: SinkhornProblem) -> KernelSource:
    """The source of the kernel that solves p, equal for all matrices of a size."""
    gradient = p.kind == "sinkhorn_gradient"
    name = f"jdg_{p.kind}_{p.n}"
    text = _TEXT.format(
        threads=THREADS,
        name=name,
        kind=p.kind,
        n=p.n,
        by="const float* by, " if gradient else "",
        by_given="by, " if gradient else "",
    )
    return KernelSource(name, text, (("problem", str(p)),), shared_memory=shared_memory(p))


def _plan(p: SinkhornProblem, config: None, chip: Chip, given: Operands) -> LaunchPlan:
    source = kernel_source(p)
    launch = Launch(
        kernel=compile_kernel(source, arch=chip.arch),
        grid=(-(-p.matrices // THREADS), 1, 1),
        block=THREADS,
        params=(
            *(Operand(one.index) for one in given.values()),
            Result(0),
            Scalar(p.matrices, "int32"),
            Scalar(steps_of(p), "int32"),
            Scalar(p.eps, "float32"),
        ),
        shared_memory=source.shared_memory,
    )
    return LaunchPlan((launch,), label=str(p))


def _refusal(p: SinkhornProblem) -> str:
    if p.matrices > MOST_MATRICES:
        return f"there are {p.matrices} matrices, the kernels take {MOST_MATRICES}"
    return beyond(p.n, p.iterations)


KERNELS = Kernels[SinkhornProblem, None](
    sources=lambda p, config: [kernel_source(p)],
    plan=_plan,
    refusal=_refusal,
    shared_bytes=lambda p, config: shared_memory(p),
)
