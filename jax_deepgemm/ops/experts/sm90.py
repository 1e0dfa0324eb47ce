"""A layer of experts as five launches in a chain (core/chain.py): the problems of its parts, and their plans.

    dispatch       ids, weights    -> sizes, position, token and weight of each row
    quantize       x, token        -> rows in FP8, and their scales
    first product  rows, w13       -> the activation in FP8, and its scales, weighted
    second product activation, w2  -> rows of y
    sum            rows, position  -> y

The parts and their configurations are those of the ops in a row, and so are the bits of y.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jax_deepgemm.core.chain import Part, chained
from jax_deepgemm.core.chip import H200, Chip
from jax_deepgemm.core.family import Given, Kernels, Operands
from jax_deepgemm.core.launch import LaunchPlan, Operand, Result, Scratch
from jax_deepgemm.jit import KernelSource
from jax_deepgemm.ops.dispatch.family import FAMILY as DISPATCH
from jax_deepgemm.ops.dispatch.problem import DispatchProblem
from jax_deepgemm.ops.experts.family import ExpertsProblem
from jax_deepgemm.ops.experts.limits import refusal
from jax_deepgemm.ops.grouped.family import FAMILY as GROUPED
from jax_deepgemm.ops.grouped.problem import ROWS, GroupedProblem
from jax_deepgemm.ops.quantize.family import FAMILY as QUANTIZE
from jax_deepgemm.ops.quantize.problem import TILE, QuantizeProblem
from jax_deepgemm.ops.rows.family import FAMILY as SUMS
from jax_deepgemm.ops.rows.problem import RowsProblem

_SCALES_OF_16_BYTES = 4


class _Problems(NamedTuple):
    dispatch: DispatchProblem
    quantize: QuantizeProblem
    first: GroupedProblem
    second: GroupedProblem
    sums: RowsProblem


_FAMILIES = _Problems(DISPATCH, QUANTIZE, GROUPED, GROUPED, SUMS)  # type: ignore[arg-type]


def problems(p: ExpertsProblem) -> _Problems:
    """What the parts compute."""
    rows, groups = p.copies, p.experts
    product: dict[str, Any] = {
        "groups": groups,
        "m": rows,
        "segments": groups,
        "expected": p.expected,
        "chained": True,
    }
    row_bytes = p.hidden * (4 if p.x == "float32" else 2)
    return _Problems(
        DispatchProblem(rows, groups, slots=p.slots),
        QuantizeProblem("quantize", rows, p.hidden, p.x, indexed=True, chained=True),
        GroupedProblem(ROWS, n=2 * p.inner, k=p.hidden, b=p.w13, gated=True, **product),
        GroupedProblem(ROWS, n=p.hidden, k=p.inner, b=p.w2, out=p.x, **product),
        RowsProblem(p.tokens, rows, row_bytes, slots=p.slots, dtype=p.x, chained=True),
    )


def _plan(p: ExpertsProblem, config: None, chip: Chip, given: Operands) -> LaunchPlan:
    rows, fitted = p.copies, -(-p.inner // TILE // _SCALES_OF_16_BYTES) * _SCALES_OF_16_BYTES
    shapes: dict[str, tuple[tuple[int, ...], int]] = {
        "sizes": ((p.experts,), 4),
        "position": ((rows,), 4),
        "token": ((rows,), 4),
        "row_weights": ((rows,), 4),
        "rows": ((rows, p.hidden), 1),
        "rows_scales": ((rows, p.hidden // TILE), 4),
        "act": ((rows, p.inner), 1),
        "act_scales": ((rows, fitted), 4),
        "y": ((rows, p.hidden), 4 if p.x == "float32" else 2),
    }
    places: dict[str, Operand | Scratch | Result] = {name: Scratch(i) for i, name in enumerate(shapes)}
    places |= {name: Operand(one.index) for name, one in given.items()}
    places |= {"result": Result(0)}
    sizes = {name: shape for name, (shape, _) in shapes.items()}
    sizes |= {name: one.shape for name, one in given.items()}

    def part(which: str, reads: dict[str, str], gives: tuple[str, ...]) -> Part:
        """reads: part of the op -> buffer of the chain."""
        operands = {role: Given(i, sizes[name]) for i, (role, name) in enumerate(reads.items())}
        plan = getattr(_FAMILIES, which).plan(getattr(problems(p), which), chip, operands)
        return Part(plan, tuple(places[name] for name in reads.values()), tuple(places[n] for n in gives))

    first = {"a": "rows", "a_scales": "rows_scales", "b": "w13", "b_scales": "w13_scales"}
    second = {"a": "act", "a_scales": "act_scales", "b": "w2", "b_scales": "w2_scales"}
    described = {"row_weights": "row_weights", "group_sizes": "sizes"}
    parts = (
        part("dispatch", {"ids": "ids", "weights": "weights"}, ("sizes", "token", "row_weights", "position")),
        part("quantize", {"x": "x", "index": "token"}, ("rows", "rows_scales")),
        part("first", first | described, ("act", "act_scales")),
        part("second", second | {"group_sizes": "sizes"}, ("y",)),
        part("sums", {"x": "y", "index": "position"}, ("result",)),
    )
    scratch = [_bytes(shape, size) for shape, size in shapes.values()]
    return chained(parts, scratch, str(p))


def _bytes(shape: tuple[int, ...], size: int) -> int:
    for extent in shape:
        size *= extent
    return size


def _sources(p: ExpertsProblem, config: None) -> list[KernelSource]:
    pairs = zip(_FAMILIES, problems(p), strict=True)
    return [source for family, problem in pairs for source in family.sources(problem, H200)]  # type: ignore[attr-defined]


KERNELS = Kernels[ExpertsProblem, None](sources=_sources, plan=_plan, refusal=refusal)
