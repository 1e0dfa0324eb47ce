"""Shapes of other models than DeepSeek-V3: hidden sizes 2880 to 6144, 8 to 512 experts, odd numbers of rows.

No figures of DeepGEMM are recorded for them; dense rows are measured beside cuBLASLt as in the other tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from jax_deepgemm.tools.bench import dense, grouped
from jax_deepgemm.tools.bench.machine import ClockLog

Problem = dense.Problem | grouped.Problem

FP8 = (
    (5760, 2880, (1, 3333)),
    (12288, 4096, (64, 1000)),
    (10240, 5120, (333, 3333)),
    (5120, 7296, (1000,)),
    (6144, 16384, (4096,)),
)
BF16 = ((5760, 2880, (1, 3333)), (12288, 4096, (64,)), (5120, 7296, (1000,)), (6144, 6144, (333, 3333)))
"""n, k, and numbers of rows of A."""
GROUPED = (
    (8, 2000, 16384, 6144),
    (64, 333, 5120, 1536),
    (128, 33, 5760, 2880),
    (128, 100, 3072, 4096),
    (512, 20, 1024, 4096),
)
"""Groups, rows expected in each (drawn 0.7 to 1.3 times as many), n, k."""


def tables() -> dict[str, list[Problem]]:
    """Returns the problems of the one table.

    >>> len(tables()["shapes"])
    24
    """
    return {"shapes": _problems(FP8, BF16, GROUPED)}


def small_tables() -> dict[str, list[Problem]]:
    """Returns a few small problems, to try the machinery where there is no GPU."""
    return {"shapes": _problems(((192, 320, (33,)),), ((192, 320, (33,)),), ((4, 9, 64, 192),))}


def _problems(fp8: Any, bf16: Any, experts: Any) -> list[Problem]:
    found: list[Problem] = [dense.Problem("fp8", m, n, k) for n, k, rows in fp8 for m in rows]
    found += [dense.Problem("bf16", m, n, k) for n, k, rows in bf16 for m in rows]
    for groups, m, n, k in experts:
        sizes = grouped.draw_sizes(groups, m, groups * m - groups // 2)  # the mean of what is drawn: quick
        found += [
            grouped.Problem("m_grouped", kind, "drawn", groups, m, n, k, sizes) for kind in grouped.KINDS
        ]
    return found


def measure(
    problems: Sequence[Problem], *, calls: int, flush: Callable[[], None], clocks: ClockLog | None
) -> Iterator[dict[str, Any]]:
    """Measures problems as the tables of their kind do; yields a row for each."""
    for kind, same_kind in groupby(problems, key=type):
        module = dense if kind is dense.Problem else grouped
        for row in module.measure(list(same_kind), calls=calls, flush=flush, clocks=clocks):
            if kind is dense.Problem:
                row |= {"op": "dense", "type": row["table"], "groups": 1}
            yield {"op": row["table"]} | row | {"table": "shapes"}
