"""Planning a dispatch: problem -> source text and LaunchPlan; include/jax_deepgemm/dispatch/dispatch.cuh says
how. Few copies are for one block of threads, more for a cluster, whose blocks meet cheaply, and many for a
grid."""

from __future__ import annotations

from typing import NamedTuple

from jax_deepgemm.core.chip import H200, Chip, shared_memory_of
from jax_deepgemm.core.family import Kernels, Operands
from jax_deepgemm.core.launch import (
    Launch,
    LaunchPlan,
    Memset,
    Operand,
    Param,
    Result,
    Scalar,
    Scratch,
)
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.ops.dispatch.problem import DispatchProblem

MOST_WARPS, FEWEST_WARPS = 32, 4
CLUSTER = 8
"""Blocks of the largest cluster that every Hopper takes."""
ALONE, TOGETHER = 2048, 1 << 15
"""So many copies are for one block, and for one cluster. A copy that is placed is a store to a sector of its
own, which an SM makes one of in about a cycle."""
OF_A_BLOCK = 2048
"""Copies that are worth a block of a grid."""
SHARED_BYTES = shared_memory_of("90a")
COUNTER_BYTES = 128
"""In front of the blocks' counts: how many blocks have come to the meeting."""

# include/jax_deepgemm/dispatch/dispatch.cuh says what each field means.
_TEXT = """\
#include <jax_deepgemm/dispatch/dispatch.cuh>

struct Config {{
  static constexpr int WARPS = {warps}, WIDTH = {width};
  static constexpr jdg::Meeting MEETING = jdg::Meeting::{meeting};
  static constexpr bool CAPACITY = {capacity}, OF_ROWS = {of_rows};
}};

extern "C" __global__ void __launch_bounds__({threads}, 1) {name}(
    const int* ids, {given}int* sizes, {rows}, int* position, {scratch}int copies, int experts,
    int capacity{slots}) {{
  jdg::dispatch<Config>({{ids, sizes, {source}, position, {blocks}, {arrived}, copies, experts, capacity,
                         {of_row}}});
}}
"""


class Cut(NamedTuple):
    """How copies are cut: the meeting (as dispatch.cuh names it), blocks, warps of a block."""

    meeting: str
    blocks: int
    warps: int

    @property
    def width(self) -> int:
        """Counts of an expert that a lane adds up."""
        return -(-self.blocks // 32)

    @property
    def name(self) -> str:
        return self.meeting.removeprefix("k").lower()


def shared_memory(experts: int, warps: int) -> int:
    """Counts of each warp, first rows, totals; sums of the scan over experts."""
    return 4 * (experts * (warps + 2) + warps)


def cut_of(p: DispatchProblem, num_sms: int) -> Cut:
    """How many blocks and warps plan a dispatch.

    >>> [str(cut_of(DispatchProblem(copies, 256), 132).blocks) for copies in (8, 2048, 4096, 32768, 1 << 20)]
    ['1', '1', '4', '8', '132']
    """
    if p.copies <= ALONE:
        meeting, blocks = "kAlone", 1
    elif p.copies <= TOGETHER:
        meeting, blocks = "kCluster", min(_power_of_two(-(-p.copies // (ALONE // 2))), CLUSTER)
    else:
        meeting, blocks = "kGrid", min(-(-p.copies // OF_A_BLOCK), num_sms)
    copies = -(-p.copies // blocks)
    warps = min(max(_power_of_two(-(-max(copies, p.experts) // 32)), FEWEST_WARPS), MOST_WARPS)
    while shared_memory(p.experts, warps) > SHARED_BYTES:
        warps //= 2
    return Cut(meeting, blocks, warps)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def kernel_source(p: DispatchProblem, cut: Cut) -> KernelSource:
    """The source of the kernel that solves p, equal for all sizes that are cut alike."""
    parts = ["jdg_dispatch", cut.name, f"w{cut.warps}"]
    parts += [f"x{cut.width}"] if cut.width > 1 else []
    parts += ["capacity"] if p.capacity else []
    parts += ["chained"] if p.slots else []
    given = [name for name, _ in _scratch(cut)]
    text = _TEXT.format(
        name="_".join(parts),
        warps=cut.warps,
        width=cut.width,
        threads=32 * cut.warps,
        meeting=cut.meeting,
        capacity=str(p.capacity > 0).lower(),
        **_rows_text(p),
        scratch="".join(f"{kind} {name}, " for name, kind in _scratch(cut)),
        blocks="blocks" if "blocks" in given else "nullptr",
        arrived="arrived" if "arrived" in given else "nullptr",
    )
    shared = shared_memory(p.experts, cut.warps)
    return KernelSource("_".join(parts), text, (("problem", str(p)),), shared_memory=shared)


def _rows_text(p: DispatchProblem) -> dict[str, str]:
    """What of the source says which copy each row holds, or its token and weight."""
    if p.slots:
        return {
            "of_rows": "true",
            "given": "const float* weights, ",
            "rows": "int* token, float* row_weights",
            "slots": ", int slots",
            "source": "nullptr",
            "of_row": "token, row_weights, weights, slots",
        }
    return {
        "of_rows": "false",
        "given": "",
        "rows": "int* source",
        "slots": "",
        "source": "source",
        "of_row": "nullptr, nullptr, nullptr, 1",
    }


def _scratch(cut: Cut) -> list[tuple[str, str]]:
    """Name and type of the parameters that are scratch memory."""
    counter = [("arrived", "jdg::u32*")] if cut.meeting == "kGrid" else []
    return [("blocks", "int*"), *counter] if cut.blocks > 1 else []


def _plan(p: DispatchProblem, config: None, chip: Chip, given: Operands) -> LaunchPlan:
    cut = cut_of(p, chip.num_sms)
    source, grid = kernel_source(p, cut), cut.meeting == "kGrid"
    places = {"blocks": Scratch(0, COUNTER_BYTES), "arrived": Scratch(0)}
    scratch: list[Param] = [places[name] for name, _ in _scratch(cut)]
    sizes = [Scalar(size, "int32") for size in (p.copies, p.experts, p.capacity)]
    operands: list[Param] = [Operand(0)]
    if p.slots:
        operands.append(Operand(1))
        sizes.append(Scalar(p.slots, "int32"))
    results = [Result(i) for i in range(4 if p.slots else 3)]
    launch = Launch(
        kernel=compile_kernel(source, arch=chip.arch),
        grid=(cut.blocks, 1, 1),
        block=32 * cut.warps,
        params=(*operands, *results, *scratch, *sizes),
        cluster=cut.blocks if cut.meeting == "kCluster" else 1,
        shared_memory=source.shared_memory,
        cooperative=grid,
        blocks_per_sm=1 if grid else 0,
    )
    steps = (Memset(Scratch(0), 4), launch) if grid else (launch,)
    memory = (COUNTER_BYTES + 4 * p.experts * cut.blocks,) if cut.blocks > 1 else ()
    return LaunchPlan(steps, memory, label=str(p))


def _shared_bytes(p: DispatchProblem, config: None) -> int:
    return shared_memory(p.experts, cut_of(p, H200.num_sms).warps)


KERNELS = Kernels[DispatchProblem, None](
    sources=lambda p, config: [kernel_source(p, cut_of(p, H200.num_sms))],
    plan=_plan,
    shared_bytes=_shared_bytes,
)
