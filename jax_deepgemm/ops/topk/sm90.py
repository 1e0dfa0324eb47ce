"""Finding the largest numbers of rows: problem -> source text and LaunchPlan;
include/jax_deepgemm/topk/topk.cuh says how."""

from __future__ import annotations

from typing import NamedTuple

from jax_deepgemm.core.chip import H200, Chip
from jax_deepgemm.core.family import Kernels, Operands
from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Param, Result, Scalar
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.ops.topk.problem import TopkProblem

MOST_CANDIDATES = 8192
"""Of the list of a block: rows that are no longer need no sample."""
SAMPLE, LARGE_SAMPLE, LONG = 4096, 16384, 1 << 18
"""Numbers of the sample, and of that of rows longer than LONG: of the top 2048 of 2^20, 32 are then in it."""
MOST_PIECES = 16
"""Blocks of the largest cluster that an H100 or H200 takes."""
OF_A_PIECE = 8192
"""Numbers that are worth a block."""
BINS, FOUND_BYTES = 2048, 160

# include/jax_deepgemm/topk/topk.cuh says what each field means.
_TEXT = """\
#include <jax_deepgemm/topk/topk.cuh>

struct Config {{
  static constexpr jdg::Number NUMBER = jdg::Number::{number};
  static constexpr int THREADS = {threads}, PIECES = {pieces};
  static constexpr bool WINDOWS = {windows}, VALUES = {values}, BY_INDEX = {by_index};
}};

extern "C" __global__ void __launch_bounds__({threads}, {resident}) {name}(
    const void* x, {given}{result}int* indices, int n, int k, int capacity, int sorted, int sample) {{
  const jdg::TopkSizes size{{n, k, capacity, sorted, sample}};
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
      capacity: candidates that a block has a place for.
      sorted: places for what is chosen.
      sample: numbers of the sample of a row that is longer than the capacity.
    """

    threads: int
    pieces: int
    capacity: int
    sorted: int
    sample: int

    @property
    def shared_bytes(self) -> int:
        return 8 * (self.capacity + self.sorted) + 4 * BINS + FOUND_BYTES

    @property
    def resident(self) -> int:
        """Blocks that an SM has registers for, 64 of a thread."""
        return 1024 // self.threads


def cut_of(p: TopkProblem, num_sms: int) -> Cut:
    """How rows are cut: whole ones where there are many, and else so that there are two blocks for each SM.

    >>> cut_of(TopkProblem(8192, 65536, 2048), 132)
    Cut(threads=512, pieces=1, capacity=8192, sorted=2048, sample=4096)
    >>> [cut_of(TopkProblem(rows, 1 << 20, 2048), 132).pieces for rows in (1, 16, 64, 132)]
    [16, 16, 4, 2]
    """
    wanted = min(2 * num_sms // p.rows, -(-p.columns // OF_A_PIECE), MOST_PIECES)
    pieces = 1 << max(wanted, 1).bit_length() - 1
    threads = 128 if p.columns <= 1024 else 512
    if threads == 512 and p.columns <= 4096 and p.rows > 2 * num_sms:
        threads = 256
    return Cut(
        threads,
        pieces,
        capacity=min(max(_power_of_two(p.columns), 32), MOST_CANDIDATES),
        sorted=_power_of_two(p.k),
        sample=LARGE_SAMPLE if p.columns > LONG else SAMPLE,
    )


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
    sizes = (p.columns, p.k, cut.capacity, cut.sorted, cut.sample)
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
