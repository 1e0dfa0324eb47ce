"""Several launch plans as one: a chain of launches in one custom call, each of which may start while the one
before it still runs (programmatic dependent launch).

Between custom calls that does not act: XLA captures each as a graph of its own, a node of the program's
graph, and such a node waits for all of the one before. So a chain is one op, and what its parts hand on is
scratch memory.

Who reads what when: the first launch starts when all before the call has finished. Every other kernel waits
(`griddepcontrol.wait`) before it touches what the one right before it writes, and says only behind that wait
that the next one may start. A kernel that starts then knows that all but the one right before it have
finished: what these gave, and the operands of the call, it may read at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jax_deepgemm.core.parameters import Buffer, Operand, Param, Result, Scratch, TensorMap
from jax_deepgemm.core.plan import Launch, LaunchPlan


@dataclass(frozen=True)
class Part:
    """A plan, and which buffers of the chain its operands and results are, in their order.

    Attributes:
      plan: launches only; its kernels wait as this file says, but for those of the first part.
      operands, results: of the chain.
    """

    plan: LaunchPlan
    operands: tuple[Buffer, ...]
    results: tuple[Buffer, ...]


def chained(parts: Sequence[Part], scratch_bytes: Sequence[int], label: str) -> LaunchPlan:
    """The parts in a row.

    Args:
      parts: in order.
      scratch_bytes: of the scratch buffers that the parts' buffers name.
      label: of the whole.

    Raises:
      ValueError: a part has scratch memory of its own, or does more than launch.
    """
    steps = [step for part in parts for step in renamed(part)]
    overlapped = tuple(replace(step, pdl=i > 0) for i, step in enumerate(steps))
    return LaunchPlan(overlapped, tuple(scratch_bytes), label)


def in_turn(plan: LaunchPlan) -> LaunchPlan:
    """The plan of which no kernel starts before the one in front of it has ended."""
    steps = (replace(step, pdl=False) if isinstance(step, Launch) else step for step in plan.steps)
    return replace(plan, steps=tuple(steps))


def renamed(part: Part) -> list[Launch]:
    """A part's launches with the buffers of the whole, for plans whose launches wait for each other.

    Raises:
      ValueError: the part has scratch memory of its own, or does more than launch.
    """
    if part.plan.scratch_bytes or not all(isinstance(step, Launch) for step in part.plan.steps):
        raise ValueError(f"{part.plan.label} is no part of a chain: it does more than launch.")
    return [
        replace(step, params=tuple(_renamed(param, part) for param in step.params))
        for step in part.plan.steps
        if isinstance(step, Launch)
    ]


def _renamed(param: Param, part: Part) -> Param:
    if isinstance(param, TensorMap):
        return replace(param, buffer=_place(param.buffer, part))
    return _place(param, part) if isinstance(param, (Operand, Result, Scratch)) else param


def _place(buffer: Buffer, part: Part) -> Buffer:
    place = (part.operands if isinstance(buffer, Operand) else part.results)[buffer.index]
    return replace(place, byte_offset=place.byte_offset + buffer.byte_offset)
