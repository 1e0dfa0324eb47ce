"""Rows whose groups differ much in size, each beside the same product with rows spread evenly.

"half": one expert has half of all rows, the others 0.7 to 1.3 times the mean of what is left. "few": 0 to 40
rows for each of very many experts. The even case has as many rows, and the same experts without any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from jax_deepgemm.core.bench import Beside, Row
from jax_deepgemm.ops.grouped.bench_rows import Sizes, contiguous, draw_sizes

HALF = ((8, 16384, 4096, 7168), (32, 32768, 4096, 7168), (32, 32768, 7168, 2048))
"""Groups, rows in all, n, k."""
FEW = ((256, 40, 7168, 2048), (256, 40, 2048, 4096))
"""Groups, rows of one at most, n, k."""


def half_sizes(groups: int, total: int) -> Sizes:
    """Returns sizes of which one, in the middle, is half of the total.

    >>> sizes = half_sizes(8, 16384)
    >>> sizes[4], sum(sizes), min(sizes) > 800
    (8192, 16384, True)
    """
    rest = total - total // 2
    others = draw_sizes(groups - 1, rest // (groups - 1), rest)
    return *others[: groups // 2], total // 2, *others[groups // 2 :]


def few_sizes(groups: int, most: int) -> Sizes:
    """Returns sizes of 0 to `most`, always the same.

    >>> sizes = few_sizes(256, 40)
    >>> min(sizes), max(sizes)
    (0, 40)
    """
    return tuple(map(int, np.random.default_rng(0).integers(0, most + 1, groups)))


def even_sizes(sizes: Sequence[int]) -> Sizes:
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


def rows(small: bool) -> Iterator[Row]:
    """The table's rows."""
    half, few = (((4, 64, 64, 128),), ((8, 5, 64, 128),)) if small else (HALF, FEW)
    for case, make, shapes in (("half", half_sizes, half), ("few", few_sizes, few)):
        for groups, size, n, k in shapes:
            for kind in ("fp8", "bf16"):
                yield skewed(case, kind, n, k, make(groups, size))


def skewed(case: str, kind: str, n: int, k: int, sizes: Sizes) -> Row:
    """Returns a row beside that of even sizes, on the same operands.

    >>> row = skewed("few", "fp8", 64, 128, (0, 7, 1, 3))
    >>> row.name, row.baseline.fields["group_sizes"]
    ('skew few fp8 groups=4 m=11 n=64 k=128', [0, 4, 4, 3])
    """
    groups, total = len(sizes), sum(sizes)
    expected = -(-total // groups)
    row = contiguous(kind, "drawn", expected, n, k, sizes)
    even = contiguous(kind, "even", expected, n, k, even_sizes(sizes))
    beside = Beside(
        "the same rows, spread evenly",
        even.function,
        row.operands,
        even.constants,
        fields={"table": "m_grouped", **even.fields},
        ours=True,
    )
    return replace(
        row,
        name=f"skew {case} {kind} groups={groups} m={total} n={n} k={k}",
        fields={**row.fields, "case": case, "m": total},
        session=None,
        baseline=beside,
    )
