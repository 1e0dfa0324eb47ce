"""Routing kernels: problem -> source text and LaunchPlan.

A warp per token; include/jax_deepgemm/route/ says how.
"""

from __future__ import annotations

from typing import NamedTuple

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Kernels, Operands
from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Result, Scalar
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.ops.route.family import RouteProblem, beyond

THREADS = 128
WARP = 32
_LOAD = 16  # bytes that a lane reads at once, at most

# RouteConfig of include/jax_deepgemm/route/route.cuh says what each field means.
_ROUTE_TEXT = """\
#include <jax_deepgemm/route/route.cuh>

struct Config {{
  using In = {x};
  static constexpr jdg::Score SCORE = jdg::Score::{score};
  static constexpr int EXPERTS = {experts}, TOP_K = {top_k}, GROUPS = {groups}, TOP_GROUPS = {top_groups};
  static constexpr int LANES = {lanes}, PARTS = {parts}, VALUES = {values};
  static constexpr int VECTOR = {vector}, VECTOR_BIAS = {vector_bias};
  static constexpr bool BIASED = {biased}, RENORMALIZE = {renormalize};
}};

extern "C" __global__ void __launch_bounds__({threads}) {name}(
    const {x}* __restrict__ logits, {bias}int* ids, float* weights, int tokens, float scale) {{
  jdg::route<Config>(logits, {bias_given}, ids, weights, tokens, scale);
}}
"""

_GRADIENT_TEXT = """\
#include <jax_deepgemm/route/route_gradient.cuh>

struct Config {{
  using In = {x};
  static constexpr jdg::Score SCORE = jdg::Score::{score};
  static constexpr int EXPERTS = {experts}, TOP_K = {top_k}, LANES = {lanes}, VECTOR = {vector};
  static constexpr bool RENORMALIZE = {renormalize};
}};

extern "C" __global__ void __launch_bounds__({threads}) {name}(
    const {x}* __restrict__ logits, const int* ids, const float* by, {x}* gradient, int tokens,
    float scale) {{
  jdg::route_gradient<Config>(logits, ids, by, gradient, tokens, scale);
}}
"""

_TYPES = {"bfloat16": "jdg::bf16", "float32": "float"}
_SHORT = {"bfloat16": "bf16", "float32": "f32"}
_SIZES = {"bfloat16": 2, "float32": 4}
_SCORES = {
    "softmax": "kSoftmax",
    "sigmoid": "kSigmoid",
    "sqrt_softplus": "kSqrtSoftplus",
    None: "kReady",
}


class Cut(NamedTuple):
    """How a token's experts are divided among lanes.

    Attributes:
      lanes: of a token, a power of two; 32, or one for each expert.
      parts: lanes of a group.
      values: experts of a lane, neighbours.
    """

    lanes: int
    parts: int
    values: int


def _power(count: int) -> int:
    """The next power of two.

    >>> [_power(count) for count in (1, 3, 8)]
    [1, 4, 8]
    """
    return 1 << (count - 1).bit_length()


def groups_of(p: RouteProblem) -> int:
    """Groups that limit the choice, 1 where none does."""
    return p.router.num_groups if p.router.grouped else 1


def cut_of(p: RouteProblem) -> Cut:
    """Every lane has experts of one group; as many lanes as there can be have some.

    >>> from jax_deepgemm.ops.route.router import Router
    >>> cut_of(RouteProblem("route", 1, 256, Router(8, "sigmoid", 8, 4)))
    Cut(lanes=32, parts=4, values=8)
    >>> cut_of(RouteProblem("route", 1, 6, Router(2)))
    Cut(lanes=8, parts=8, values=1)
    """
    groups, size = _power(groups_of(p)), p.experts // groups_of(p)
    parts = min(WARP // groups, _power(size))
    return Cut(groups * parts, parts, -(-size // parts))


def gradient_lanes(p: RouteProblem) -> int:
    """Lanes of a token: 32, or one for each expert."""
    return min(WARP, _power(p.experts))


def vector(most: int, *counts: int) -> int:
    """How many numbers can be moved at once, where so many lie side by side: a power of two.

    >>> vector(4, 8, 256), vector(4, 5, 160), vector(8, 12, 36)
    (4, 1, 4)
    """
    while any(count % most for count in counts):
        most //= 2
    return most


def kernel_name(p: RouteProblem) -> str:
    """The name that profilers show."""
    r = p.router
    parts = ["jdg", p.kind, r.score or "ready", f"e{p.experts}", f"k{r.top_k}"]
    parts += [f"g{r.num_groups}x{r.top_groups}"] if r.grouped and p.kind == "route" else []
    parts += [_SHORT[p.x], *["bias"] * p.biased, *["sum1"] * r.renormalize]
    return "_".join(parts)


def kernel_source(p: RouteProblem) -> KernelSource:
    """The source of the kernel that solves p, equal for any number of tokens and any scale."""
    r, name, most = p.router, kernel_name(p), _LOAD // _SIZES[p.x]
    fields = {
        "x": _TYPES[p.x],
        "score": _SCORES[r.score],
        "experts": p.experts,
        "top_k": r.top_k,
        "renormalize": str(r.renormalize).lower(),
        "threads": THREADS,
        "name": name,
    }
    if p.kind == "route_gradient":
        lanes = gradient_lanes(p)
        while lanes * most > max(p.experts, lanes):
            most //= 2
        text = _GRADIENT_TEXT.format(**fields, lanes=lanes, vector=vector(most, p.experts))
    else:
        cut, groups = cut_of(p), groups_of(p)
        text = _ROUTE_TEXT.format(
            **fields,
            **cut._asdict(),
            groups=groups,
            top_groups=r.top_groups if groups > 1 else 1,
            vector=vector(most, cut.values, p.experts // groups),
            vector_bias=vector(_LOAD // 4, cut.values, p.experts // groups),
            biased=str(p.biased).lower(),
            bias="const float* bias, " if p.biased else "",
            bias_given="bias" if p.biased else "nullptr",
        )
    return KernelSource(name, text, (("problem", str(p)),))


def _plan(p: RouteProblem, config: None, chip: Chip, given: Operands) -> LaunchPlan:
    lanes = gradient_lanes(p) if p.kind == "route_gradient" else cut_of(p).lanes
    results = 1 if p.kind == "route_gradient" else 2
    launch = Launch(
        kernel=compile_kernel(kernel_source(p), arch=chip.arch),
        grid=(-(-p.tokens // (THREADS // lanes)), 1, 1),
        block=THREADS,
        params=(
            *(Operand(one.index) for one in given.values()),
            *(Result(i) for i in range(results)),
            Scalar(p.tokens, "int32"),
            Scalar(p.router.scale, "float32"),
        ),
    )
    return LaunchPlan((launch,), label=str(p))


KERNELS = Kernels[RouteProblem, None](
    sources=lambda p, config: [kernel_source(p)],
    plan=_plan,
    refusal=lambda p: beyond(p.experts, p.router),
)
