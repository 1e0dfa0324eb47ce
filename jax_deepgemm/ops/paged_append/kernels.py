"""Appending to a cache: problem -> source text and LaunchPlan; include/jax_deepgemm/paged_append/append.cuh
says how."""

from __future__ import annotations

import math

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Kernels, Operands
from jax_deepgemm.core.launch import Copy, Launch, LaunchPlan, Operand, Param, Result, Scalar
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.ops.paged_append.problem import AppendProblem

THREADS, HELD, WIDEST = 256, 4, 8
MOST_DIM = 256
MOST_GROUPS = 65_535
"""Of HELD heads: blocks along a grid's y."""

_TEXT = """\
#include <jax_deepgemm/paged_append/append.cuh>

struct Config {{
  using In = {dtype};
  using Stored = {stored};
  static constexpr int D = {depth}, DV = {v_depth}, PAIRS = {pairs}, WIDE = {wide};
  static constexpr bool INTERLEAVED = {interleaved}, QUERIES = {queries};
}};

extern "C" __global__ void __launch_bounds__({threads}) {name}(
    const {dtype}* k_new, const {dtype}* v_new, const int* slots, const float* k_scale, const float* v_scale,
    const int* layer, {rotary}{query}{stored}* k, {stored}* v, {turned}int count, int heads, int q_heads,
    int layers, int pages, int page) {{
  jdg::append<Config>({{k_new, v_new, {q}, slots, {angles}, {to}, count, heads, q_heads}},
                      {{k, v, k_scale, v_scale, layer, layers, pages, page}});
}}
"""
_TYPES = {
    "bfloat16": "jdg::bf16",
    "float16": "jdg::f16",
    "float32": "float",
    "float8_e4m3fn": "jdg::e4m3",
}
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float8_e4m3fn": "e4m3"}
_BYTES = {"bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


def wide_of(p: AppendProblem) -> int:
    """Neighbours of a key that a thread loads at once: pairs that turn together are not parted.

    >>> [wide_of(AppendProblem(1, 8, 80, 80, 1, 4, 16, pairs=pairs)) for pairs in (0, 16, 10)]
    [8, 8, 2]
    """
    return math.gcd(WIDEST, 2 * p.pairs if p.interleaved else p.pairs)


def lanes_of(p: AppendProblem) -> int:
    """Threads of a token, for HELD heads of keys or of values."""
    return max(p.head_dim // (2 * wide_of(p)), p.v_head_dim // (2 * WIDEST))


def _groups(p: AppendProblem) -> int:
    return -(-p.heads // HELD) + 2 * -(-p.kv_heads // HELD)


def _refusal(p: AppendProblem) -> str:
    if max(p.head_dim, p.v_head_dim) > MOST_DIM:
        return f"heads have {p.head_dim} and {p.v_head_dim} numbers, at most {MOST_DIM}"
    return f"{p.heads} and {p.kv_heads} heads are too many" if _groups(p) > MOST_GROUPS else ""


def kernel_source(p: AppendProblem) -> KernelSource:
    """The source of the kernel that solves p, equal for all numbers of tokens, heads and pages."""
    wide, queries = wide_of(p), p.heads > 0
    name = f"jdg_paged_append_{_SHORT[p.dtype]}_{_SHORT[p.stored]}_d{p.head_dim}"
    name += f"_v{p.v_head_dim}" * (p.v_head_dim != p.head_dim) + f"_pairs{p.pairs}" * (p.pairs > 0)
    name += "_interleaved" * p.interleaved + "_queries" * queries
    dtype = _TYPES[p.dtype]
    text = _TEXT.format(
        name=name,
        threads=THREADS,
        dtype=dtype,
        stored=_TYPES[p.stored],
        depth=p.head_dim,
        v_depth=p.v_head_dim,
        pairs=p.pairs,
        wide=wide,
        interleaved=str(p.interleaved).lower(),
        queries=str(queries).lower(),
        rotary="const int* positions, const float* inv_freq, " if p.pairs else "",
        angles="positions, inv_freq" if p.pairs else "nullptr, nullptr",
        query=f"const {dtype}* q, " if queries else "",
        turned=f"{dtype}* turned, " if queries else "",
        q="q" if queries else "nullptr",
        to="turned" if queries else "nullptr",
    )
    return KernelSource(name, text, (("problem", str(p)),))


def _plan(p: AppendProblem, config: None, chip: Chip, given: Operands) -> LaunchPlan:
    size = p.layers * p.pages * p.kv_heads * p.page * _BYTES[p.stored]
    copies = [Copy(Operand(3 + i), Result(i), size * d) for i, d in enumerate((p.head_dim, p.v_head_dim))]
    if not p.tokens or not size:
        return LaunchPlan(tuple(copies), label=str(p))
    lanes = lanes_of(p)
    threads = min(THREADS, -(-p.tokens * lanes // 32) * 32)
    read = [0, 1, 2, 5, 6, 7, *([8, 9] if p.pairs else []), *([10] if p.heads else [])]
    written: list[Param] = [Result(i) for i in range(3 if p.heads else 2)]
    numbers = (p.tokens, p.kv_heads, p.heads, p.layers, p.pages, p.page)
    launch = Launch(
        kernel=compile_kernel(kernel_source(p), arch=chip.arch),
        grid=(-(-p.tokens // (threads // lanes)), _groups(p), 1),
        block=threads,
        params=(*map(Operand, read), *written, *(Scalar(number, "int32") for number in numbers)),
    )
    return LaunchPlan((*copies, launch), label=str(p))


KERNELS = Kernels[AppendProblem, None](
    sources=lambda p, config: [kernel_source(p)], plan=_plan, refusal=_refusal
)
