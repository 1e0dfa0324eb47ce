"""Grouped products whose groups differ much in size, each beside the same product with rows spread evenly.

"half": one expert has half of all rows, the others 0.7 to 1.3 times the mean of what is left. "few": 0 to 40
rows for each of very many experts. The even case has as many rows, and the same experts without any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_deepgemm.tools.bench import grouped
from jax_deepgemm.tools.bench.machine import ClockLog

HALF = ((8, 16384, 4096, 7168), (32, 32768, 4096, 7168), (32, 32768, 7168, 2048))
"""Groups, rows in all, n, k."""
FEW = ((256, 40, 7168, 2048), (256, 40, 2048, 4096))
"""Groups, rows of one at most, n, k."""


@dataclass(frozen=True)
class Problem:
    """One row: `case` is "half" or "few", `skewed` the product, `even` the same with other group sizes."""

    case: str
    skewed: grouped.Problem
    even: grouped.Problem

    def __str__(self) -> str:
        p = self.skewed
        return f"skew {self.case} {p.type} groups={p.groups} m={p.total} n={p.n} k={p.k}"

    @property
    def row(self) -> dict[str, Any]:
        return self.skewed.row | {"table": "skew", "case": self.case, "m": self.skewed.total}


def half_sizes(groups: int, total: int) -> tuple[int, ...]:
    """Returns sizes of which one, in the middle, is half of the total.

    >>> sizes = half_sizes(8, 16384)
    >>> sizes[4], sum(sizes), min(sizes) > 800
    (8192, 16384, True)
    """
    rest = total - total // 2
    others = grouped.draw_sizes(groups - 1, rest // (groups - 1), rest)
    return *others[: groups // 2], total // 2, *others[groups // 2 :]


def few_sizes(groups: int, most: int) -> tuple[int, ...]:
    """Returns sizes of 0 to `most`, always the same.

    >>> sizes = few_sizes(256, 40)
    >>> min(sizes), max(sizes)
    (0, 40)
    """
    return tuple(map(int, np.random.default_rng(0).integers(0, most + 1, groups)))


def even_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns as many rows spread evenly over the groups that have any.

    >>> even_sizes((0, 7, 1, 3))
    (0, 4, 4, 3)
    """
    filled = sum(size > 0 for size in sizes)
    share, more = divmod(sum(sizes), filled)
    place = np.cumsum([size > 0 for size in sizes])
    return tuple(
        share + int(at <= more) if size else 0 for size, at in zip(sizes, place.tolist(), strict=True)
    )


def tables() -> dict[str, list[Problem]]:
    """Returns the problems of the one table.

    >>> len(tables()["skew"])
    10
    """
    return {"skew": _problems(HALF, FEW)}


def small_tables() -> dict[str, list[Problem]]:
    """Returns a few small problems, to try the machinery where there is no GPU."""
    return {"skew": _problems(((4, 64, 64, 128),), ((8, 5, 64, 128),))}


def _problems(half: Any, few: Any) -> list[Problem]:
    found = []
    for case, make, shapes in (("half", half_sizes, half), ("few", few_sizes, few)):
        for groups, rows, n, k in shapes:
            sizes = make(groups, rows)
            expected = -(-sum(sizes) // groups)
            for kind in grouped.KINDS:
                skewed = grouped.Problem("m_grouped", kind, "drawn", groups, expected, n, k, sizes)
                even = replace(skewed, sizes="even", group_sizes=even_sizes(sizes))
                found.append(Problem(case, skewed, even))
    return found


def measure(
    problems: Sequence[Problem], *, calls: int, flush: Callable[[], None], clocks: ClockLog | None
) -> Iterator[dict[str, Any]]:
    """Measures each problem and its even case in one profiler session, on the same operands."""
    for problem in problems:
        try:
            drawn = grouped.operands(problem.skewed)
        except Exception as error:
            text = f"operands: {type(error).__name__}: {error}"[:400]
            yield problem.row | {"status": "failed", "error": text}
            continue
        arguments = [drawn, (*drawn[:-1], jnp.asarray(problem.even.group_sizes, jnp.int32))]
        pair = (problem.skewed, problem.even)
        skewed, even = grouped.measure_group(pair, arguments, calls, flush, clocks)
        yield skewed | problem.row | {"baseline": even | {"what": "the same rows, spread evenly"}}
