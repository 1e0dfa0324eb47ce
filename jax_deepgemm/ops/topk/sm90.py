"""Finding the largest numbers of rows: problem -> source text and LaunchPlan;
include/jax_deepgemm/topk/topk.cuh says how."""

from __future__ import annotations

from typing import NamedTuple

from jax_deepgemm.core.chip import H200, Chip
from jax_deepgemm.core.family import Kernels, Operands
from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Param, Result, Scalar
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.ops.topk.problem import TopkProblem

THREADS = (32, 64, 128, 256, 512, 1024)
"""Of a block."""
HELD = 8
"""Candidates of a thread, for which it has 64 registers."""
CLUSTERS = {16: 4, 8: 15, 4: 30, 2: 66}
"""Pieces of a row, and for how many rows at once an H200 has room, with a block for each SM."""
OF_A_PIECE = 8192
"""Numbers that are worth a block."""
SAMPLED, LEAST_SAMPLE = 16, 1024
"""One of so many numbers of a row is in its sample, but more of short rows."""
BINS, FOUND_BYTES = 4, 160
"""Of each thread, and of a block."""

# include/jax_deepgemm/topk/topk.cuh says what each field means.
_TEXT = """\
#include <jax_deepgemm/topk/topk.cuh>

struct Config {{
  static constexpr jdg::Number NUMBER = jdg::Number::{number};
  static constexpr int THREADS = {threads}, HELD = {held}, PIECES = {pieces};
  static constexpr bool WINDOWS = {windows}, VALUES = {values}, BY_INDEX = {by_index};
}};

extern "C" __global__ void __launch_bounds__({threads}, {resident}) {name}(
    const void* x, {given}{result}int* indices, int n, int k, int sample) {{
  const jdg::TopkSizes size{{n, k, sample}};
  jdg::topk<Config>(x, {start}, {end}, indices, {value}, size);
}}
"""
_NUMBERS = {"float32": "kFloat32", "bfloat16": "kBfloat16", "float16": "kFloat16"}
_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class Cut(NamedTuple):
    """How rows are cut.

    Attributes:
      threads: of a block.
      pieces: blocks of a row, a cluster.
      sample: numbers of the sample of a row that a block does not hold.
    """

    threads: int
    pieces: int
    sample: int

    @property
    def capacity(self) -> int:
        """Candidates that a block has a place for."""
        return self.threads * HELD

    @property
    def shared_bytes(self) -> int:
        return 8 * self.capacity + 4 * BINS * self.threads + FOUND_BYTES

    @property
    def resident(self) -> int:
        """Blocks that an SM has registers for; where rows are few, there is one."""
        return 1024 // self.threads if self.pieces == 1 else 1


def cut_of(p: TopkProblem, num_sms: int) -> Cut:
    """How rows are cut: few ones into pieces; the smallest blocks that hold the candidates of many.

    >>> cut_of(TopkProblem(8192, 65536, 2048), 132)
    Cut(threads=512, pieces=1, sample=4096)
    >>> [cut_of(TopkProblem(rows, 1 << 20, 2048), 132).pieces for rows in (1, 8, 64, 132)]
    [16, 8, 2, 1]
    """
    fitting = (n for n, rows in CLUSTERS.items() if p.rows <= rows and n * OF_A_PIECE <= p.columns)
    pieces = next(fitting, 1)
    quick = 32 if p.columns <= 1024 else 128 if p.rows > num_sms else 512
    for threads in THREADS:
        capacity = threads * HELD
        sample = min(max(_power_of_two(p.columns) // SAMPLED, LEAST_SAMPLE), 2 * capacity)
        if p.columns <= capacity or (threads >= quick and candidates(p, sample) <= capacity):
            break
    return Cut(threads, pieces, sample)


def candidates(p: TopkProblem, sample: int) -> float:
    """How many of a row the kernel gathers, but for one row in a hundred thousand that has more.

    >>> round(candidates(TopkProblem(64, 65536, 2048), 4096))
    4007
    """
    share = sample / p.columns
    hits = share * p.k
    wanted = (hits + 4.5 * hits**0.5 + 4) * 33 / 32  # as `guess` has it
    return (wanted + 4.5 * wanted**0.5) / share


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def kernel_source(p: TopkProblem, cut: Cut) -> KernelSource:
    """The source of the kernel that solves p, equal for all rows that are cut alike."""
    flags = {"windows": p.windows, "values": p.values, "by_index": p.by_index}
    parts = ["jdg_topk", _SHORT[p.dtype], f"t{cut.threads}"]
    parts += [f"x{cut.pieces}"] if cut.pieces > 1 else []
    name = "_".join([*parts, *(name for name, on in flags.items() if on)])
    text = _TEXT.format(
        name=name,
        number=_NUMBERS[p.dtype],
        threads=cut.threads,
        held=HELD,
        pieces=cut.pieces,
        resident=cut.resident,
        given="const int* start, const int* end, " if p.windows else "",
        result="void* values, " if p.values else "",
        start="start" if p.windows else "nullptr",
        end="end" if p.windows else "nullptr",
        value="values" if p.values else "nullptr",
        **{name: str(on).lower() for name, on in flags.items()},
    )
    return KernelSource(name, text, (("problem", str(p)),), shared_memory=cut.shared_bytes)


def _plan(p: TopkProblem, config: None, chip: Chip, given: Operands) -> LaunchPlan:
    cut = cut_of(p, chip.num_sms)
    source = kernel_source(p, cut)
    params: list[Param] = [*map(Operand, range(3 if p.windows else 1)), *map(Result, range(1 + p.values))]
    sizes = (p.columns, p.k, cut.sample)
    launch = Launch(
        kernel=compile_kernel(source, arch=chip.arch),
        grid=(p.rows * cut.pieces, 1, 1),
        block=cut.threads,
        params=(*params, *(Scalar(size, "int32") for size in sizes)),
        cluster=cut.pieces,
        shared_memory=source.shared_memory,
    )
    return LaunchPlan((launch,), label=str(p))


KERNELS = Kernels[TopkProblem, None](
    sources=lambda p, config: [kernel_source(p, cut_of(p, H200.num_sms))],
    plan=_plan,
    shared_bytes=lambda p, config: cut_of(p, H200.num_sms).shared_bytes,
)
