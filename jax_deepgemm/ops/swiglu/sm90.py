"""Activations that are not quantised: problem -> source text and LaunchPlan; include/jax_deepgemm/swiglu/
plain.cuh says how."""

from __future__ import annotations

from typing import NamedTuple

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Kernels, Operands
from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Param, Result, Scalar
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.ops.quantize.sm90 import activation_text
from jax_deepgemm.ops.swiglu.problem import SwigluProblem

WARPS = 8
WIDE = 8
MOST_HELD = {"act": 4, "grad": 2}
"""Times eight features that a lane loads at once."""

# include/jax_deepgemm/swiglu/plain.cuh says what each field means.
_TEXT = """\
#include <jax_deepgemm/swiglu/plain.cuh>

struct Config {{
  using In = {x};
  static constexpr int WARPS = {warps}, HELD = {held};
  static constexpr bool WEIGHTED = {weighted}, ALIGNED = {aligned};
}};
{activation}
extern "C" __global__ void __launch_bounds__({threads}) {name}({parameters}) {{
  {body}
}}
"""
_BODIES = {
    "act": "jdg::activate<Config, Act>({{h, h_rows}}, {{{weight}}}, act, rows, width, pieces);",
    "grad": "jdg::activate_grad<Config, Act>({{h, h_rows}}, {{{weight}}}, {{dact, dact_rows}}, dh, "
    "{dweight}, rows, width);",
}
_TYPES = {"bfloat16": "jdg::bf16", "float16": "jdg::f16", "float32": "float"}
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


class Cut(NamedTuple):
    """How a row is cut: times eight features that a lane has at once, and pieces of which each is a warp's
    (of "grad" there is one, however long)."""

    held: int
    pieces: int


def cut_of(p: SwigluProblem) -> Cut:
    """Pieces of equal length.

    >>> cut_of(SwigluProblem("act", 8, 2048)), cut_of(SwigluProblem("grad", 8, 2048))
    (Cut(held=4, pieces=2), Cut(held=2, pieces=1))
    >>> cut_of(SwigluProblem("act", 8, 768)), cut_of(SwigluProblem("act", 8, 5))
    (Cut(held=3, pieces=1), Cut(held=1, pieces=1))
    """
    lanes = max(-(-p.width // (32 * WIDE)), 1)  # eights of a lane that had the whole row
    pieces = -(-lanes // MOST_HELD[p.kind])
    return Cut(-(-lanes // pieces), 1 if p.kind == "grad" else pieces)


def _pointers(p: SwigluProblem) -> dict[str, str]:
    """Name -> type of the pointers: operands, then results, in the op's order."""
    grad = p.kind == "grad"
    wanted = {
        "h": "const Config::In*",
        "weight": "const float*" if p.weighted else "",
        "dact": "const Config::In*" if grad else "",
        "dh" if grad else "act": "Config::In*",
        "dweight": "float*" if grad and p.weighted else "",
    }
    return {name: kind for name, kind in wanted.items() if kind}


def _operands(p: SwigluProblem) -> list[str]:
    return [name for name, kind in _pointers(p).items() if kind.startswith("const")]


def _integers(p: SwigluProblem) -> list[str]:
    pieces = ["pieces"] if p.kind == "act" else []
    return ["rows", "width", *pieces, *(f"{name}_rows" for name in _operands(p))]


def kernel_name(p: SwigluProblem) -> str:
    """The name that profilers show."""
    tag = [p.activation.tag] if p.activation.tag else []
    parts = ["jdg_swiglu", p.kind, *tag, _SHORT[p.x], f"x{cut_of(p).held}"]
    return "_".join(parts + ["w"] * p.weighted + ["unaligned"] * (not p.aligned))


def kernel_source(p: SwigluProblem) -> KernelSource:
    """The source of the kernel that solves p, equal for all rows that are cut alike."""
    name, pointers = kernel_name(p), _pointers(p)
    body = _BODIES[p.kind].format(
        weight="weight, weight_rows" if p.weighted else "nullptr, 1",
        dweight="dweight" if "dweight" in pointers else "nullptr",
    )
    parameters = [f"{kind} {name}" for name, kind in pointers.items()]
    text = _TEXT.format(
        name=name,
        x=_TYPES[p.x],
        warps=WARPS,
        held=cut_of(p).held,
        threads=32 * WARPS,
        weighted=str(p.weighted).lower(),
        aligned=str(p.aligned).lower(),
        activation=activation_text(p.activation),
        parameters=", ".join([*parameters, *(f"int {name}" for name in _integers(p))]),
        body=body,
    )
    return KernelSource(name, text, (("problem", str(p)),))


def _plan(p: SwigluProblem, config: None, chip: Chip, given: Operands) -> LaunchPlan:
    pointers, operands, pieces = _pointers(p), _operands(p), cut_of(p).pieces
    several = any(one.batched for one in given.values())
    batches = p.rows // given["h"].shape[1 if given["h"].batched else 0] if several else 1
    sizes = {"rows": p.rows, "width": p.width, "pieces": pieces}
    sizes |= {f"{name}_rows": p.rows if given[name].batched else p.rows // batches for name in operands}
    params: list[Param] = [*map(Operand, range(len(operands)))]
    params += [*map(Result, range(len(pointers) - len(operands)))]
    launch = Launch(
        kernel=compile_kernel(kernel_source(p), arch=chip.arch),
        grid=(-(-p.rows // WARPS) * pieces, 1, 1),
        block=32 * WARPS,
        params=(*params, *(Scalar(sizes[name], "int32") for name in _integers(p))),
    )
    return LaunchPlan((launch,), label=str(p))


KERNELS = Kernels[SwigluProblem, None](sources=lambda p, config: [kernel_source(p)], plan=_plan)
