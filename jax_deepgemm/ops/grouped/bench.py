"""Rows of the benchmark: grouped GEMMs of DeepSeek-V3's expert layers and of other models', FP8 and BF16.

DeepGEMM's figures were recorded with group sizes of 0.7 to 1.3 times the expected ones, which are not known
any more, but their sum is: rows = us * TFLOP/s / (2 n k), the same for every (n, k) of a (groups, m) within
the rounding. So the sizes here are drawn in the same way, once and for all, with the same sum.

Contiguous groups are measured twice: "padded" with sizes that are multiples of 128, as DeepGEMM needs them
and as its figures count, which is the same work; and "drawn" without the padding, whose rate counts only the
rows that are there, and whose time is compared with that of the padded problem that DeepGEMM makes of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from jax_deepgemm.core.bench import BESIDE_PEER, CLOCK, RATES, Fields, Row, Table, every_row, recorded_rows
from jax_deepgemm.ops.gemm.bench import OTHER_SHAPES
from jax_deepgemm.ops.grouped import bench_drawn, bench_epilogue, bench_fine, bench_gathered, bench_skew
from jax_deepgemm.ops.grouped.bench_rows import UNIT, contiguous, draw_sizes, k_grouped, masked, padded

GROUPED_KEYS = ("type", "groups", "m", "n", "k")
KINDS = ("fp8", "bf16")
NK = ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))
CONTIGUOUS = {(4, 8192): 268 * 128, (8, 4096): 266 * 128, (32, 256): 83 * 128}
"""(groups, rows expected per group) -> rows of all groups, padded."""
MASKED = {(32, 192): (6560, 4096), (6, 1024): (6261, 4096), (32, 20): (670, 1024), (6, 20): (121, 1024)}
"""(groups, rows expected per group) -> (valid rows of all groups, rows of A per group)."""
INNER = {(4, 8192): 268 * 128, (8, 4096): 266 * 128, (16, 2048): 271 * 128}
"""(groups, k expected per group) -> k of all groups."""
GRADIENTS = ((4096, 7168), (7168, 2048))
OTHER = (
    (8, 2000, 16384, 6144),
    (64, 333, 5120, 1536),
    (128, 33, 5760, 2880),
    (128, 100, 3072, 4096),
    (512, 20, 1024, 4096),
)
"""Of other models than DeepSeek-V3: groups, rows expected in each (drawn 0.7 to 1.3 times as many), n, k."""


def _contiguous(small: bool) -> Iterator[Row]:
    for (groups, m), total in ({(2, 128): 384} if small else CONTIGUOUS).items():
        drawn = draw_sizes(groups, m, total, UNIT)
        for n, k in ((128, 256),) if small else NK:
            for kind in KINDS:
                yield contiguous(kind, "padded", m, n, k, padded(drawn))
                yield contiguous(kind, "drawn", m, n, k, drawn)


def _masked(small: bool) -> Iterator[Row]:
    for (groups, m), (total, capacity) in ({(2, 8): (14, 16)} if small else MASKED).items():
        sizes = draw_sizes(groups, m, total)
        for n, k in ((128, 256),) if small else NK:
            for kind in KINDS:
                yield masked(kind, m, n, k, sizes, capacity)


def _k_grouped(small: bool) -> Iterator[Row]:
    for (groups, k), total in ({(2, 128): 256} if small else INNER).items():
        sizes = padded(draw_sizes(groups, k, total, UNIT))
        for m, n in ((64, 128),) if small else GRADIENTS:
            for kind in KINDS:
                yield k_grouped(kind, m, n, k, sizes)


def _other_shapes(small: bool) -> Iterator[Row]:
    for groups, m, n, k in ((4, 9, 64, 192),) if small else OTHER:
        sizes = draw_sizes(groups, m, groups * m - groups // 2)  # the mean of what is drawn: quick
        for kind in KINDS:
            row = contiguous(kind, "drawn", m, n, k, sizes)
            yield replace(row, fields={"op": "m_grouped", **row.fields})


def _skew(small: bool) -> Iterator[Row]:
    yield from bench_skew.rows(small)
    yield from bench_drawn.skewed(small)


def _recorded(
    name: str, ways: tuple[tuple[str, ...], ...], tables: Mapping[str, Any]
) -> dict[tuple[Any, ...], Fields]:
    """DeepGEMM's figures; `ways`: keys that stand behind the type, the same figures for each."""
    found: dict[tuple[Any, ...], Fields] = {}
    for row in recorded_rows(tables, name):
        shape = [row[key] for key in GROUPED_KEYS[1:]]
        for kind in KINDS:
            figures = {"us": row[f"{kind}_us"], "tflops": row[f"{kind}_tflops"]}
            found |= {(kind, *way, *shape): figures for way in ways}
    return found


def _table(
    title: str,
    rows: Callable[[bool], Iterator[Row]],
    recorded: str,
    *,
    keys: tuple[str, ...] = GROUPED_KEYS,
    ways: tuple[tuple[str, ...], ...] = ((),),
    plotted: Callable[[Fields], bool] = every_row,
    **more: Any,
) -> Table:
    return Table(
        title,
        keys,
        rows,
        columns=(*RATES, "all us", *BESIDE_PEER, CLOCK),
        peer="DeepGEMM",
        recorded=functools.partial(_recorded, recorded, ways),
        tuned=True,
        plotted=plotted,
        **more,
    )


TABLES = {
    "m_grouped": _table(
        "M-grouped contiguous: rows of A in groups, m expected in each (padded: to multiples of 128)",
        _contiguous,
        "m_grouped_contiguous",
        keys=("type", "sizes", *GROUPED_KEYS[1:]),
        ways=(("padded",), ("drawn",)),
        part=lambda fields: f"{fields['type']}, {fields['sizes']}",
        plotted=lambda fields: bool(fields["sizes"] == "padded"),
        readme=(
            ("fp8", "padded", 4, 8192, 6144, 7168),
            ("fp8", "padded", 32, 256, 7168, 3072),
            ("fp8", "drawn", 32, 256, 7168, 3072),
            ("bf16", "padded", 8, 4096, 4096, 4096),
        ),
    ),
    "masked": _table(
        "M-grouped masked: A [groups, capacity, k], m valid rows expected in each",
        _masked,
        "m_grouped_masked",
        readme=(("fp8", 32, 192, 6144, 7168), ("fp8", 32, 20, 7168, 3072)),
    ),
    "k_grouped": _table(
        "K-grouped (weight gradient): D = C + Aᵀ B of each group, k expected in each (multiples of 128, as"
        " DeepGEMM needs them; as a router draws them: below), float32 C and D",
        _k_grouped,
        "k_grouped",
        readme=(
            ("fp8", 4, 4096, 7168, 8192),
            ("fp8", 16, 7168, 2048, 2048),
            ("bf16", 8, 4096, 7168, 4096),
        ),
    ),
    "gathered": bench_gathered.TABLE,
    "fine": bench_fine.TABLE,
    "shapes": replace(OTHER_SHAPES, rows=_other_shapes),
    "epilogue": bench_epilogue.TABLE,
    "k_drawn": bench_drawn.TABLE,
    "skew": Table(
        "Groups of very different sizes beside as many rows spread evenly: one group with half of all m rows"
        " (K-grouped: of all k), or few rows for each of many groups; ratio of times, smaller is better",
        ("type", "case", *GROUPED_KEYS[1:]),
        _skew,
        columns=("us", "TFLOP/s", "GB/s", "{baseline} us", "ratio", CLOCK),
        baseline="even sizes",
        peer="DeepGEMM",
        part=lambda fields: f"{fields['type']}, {fields['case']}",
        order=4,
    ),
}
