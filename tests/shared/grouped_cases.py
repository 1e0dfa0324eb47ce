"""Grouped GEMMs as data: shapes, calls, and patterns of group sizes that tests run over.

The tables are the expert layers of DeepSeek-V3: rows per group are drawn 0.7 to 1.3 times the expected ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

NK = ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))
CONTIGUOUS_TABLE = ((4, 8192), (8, 4096), (32, 256))  # groups, rows expected per group
MASKED_TABLE = ((32, 192, 4096), (6, 1024, 4096), (32, 20, 1024), (6, 20, 1024))  # groups, expected, max rows
K_TABLE = tuple(
    (groups, m, n, 32768 // groups) for groups in (4, 8, 16) for m, n in ((4096, 7168), (7168, 2048))
)

Call = tuple[str, str, str]
"""(operands, layout or "add" or "zero", result type)."""


@dataclass(frozen=True)
class Contiguous:
    """D [rows, n] of A [rows, k] and B [groups, n, k]; calls: operands "fp8_block", "fp8_row", "bf16_nt",
    "bf16_nn"; layout "sizes", "index" or "ends".

    Attributes:
      most: no group is larger.
      alignment: of the groups' starts.
      local: groups that B holds, from a group offset on; 0: all.
    """

    groups: int
    rows: int
    n: int
    k: int
    calls: tuple[Call, ...]
    most: int
    alignment: int = 1
    local: int = 0

    def __str__(self) -> str:
        return _name("m", self.groups, self.rows, self.n, self.k, self.calls)


@dataclass(frozen=True)
class Masked:
    """D [groups, rows, n]; calls: operands as above, "zero" for zero_rows=True or "", result type."""

    groups: int
    rows: int
    n: int
    k: int
    calls: tuple[Call, ...]
    most: int

    def __str__(self) -> str:
        return _name("masked", self.groups, self.rows, self.n, self.k, self.calls)


@dataclass(frozen=True)
class KGrouped:
    """D [groups, m, n] of operands with k rows or columns in all; calls: "fp8_nt", "fp8_tn", "bf16_tn"; "add"
    for a C, or ""; result type."""

    groups: int
    m: int
    n: int
    k: int
    calls: tuple[Call, ...]
    most: int

    def __str__(self) -> str:
        return _name("k", self.groups, self.m, self.n, self.k, self.calls)


def _name(kind: str, groups: int, first: int, second: int, third: int, calls: tuple[Call, ...]) -> str:
    operands = "+".join(dict.fromkeys(call[0].split("_")[0] for call in calls))
    return f"{kind}-{groups}x{first}x{second}x{third}-{operands}"


def draw(groups: int, expected: int, seed: int = 0, low: float = 0.7, high: float = 1.3) -> np.ndarray:
    """Group sizes, 0.7 to 1.3 times the expected."""
    return (expected * np.random.default_rng(seed).uniform(low, high, groups)).astype(np.int32)


def without(sizes: np.ndarray, *groups: int) -> np.ndarray:
    """The sizes with some groups emptied."""
    left = sizes.copy()
    left[list(groups)] = 0
    return left


def patterns(groups: int, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Sizes of groups over `rows` rows: everything that is legal, and two that are not.

    >>> {name: sizes.tolist() for name, sizes in patterns(2, 10).items()}["one group"]
    [0, 10]
    """
    rng = np.random.default_rng(seed)
    shares = rng.uniform(0.7, 1.3, groups)
    full = np.diff(np.round(np.cumsum([0, *shares]) / shares.sum() * rows)).astype(np.int32)
    negative = full.copy()
    negative[:: max(groups // 2, 1)] = -5
    found = {
        "full": full,
        "tail": (full * 4) // 5,
        "middle empty": without(full, groups // 2),
        "ends empty": without(full, 0, groups - 1),
        "all empty": np.zeros(groups, np.int32),
        "one group": np.where(np.arange(groups) == groups // 2, rows, 0),
        "ones": (np.arange(groups) < rows).astype(np.int32),
        "negative": negative,
        "too many": full * 2 + 3,
    }
    return {name: sizes.astype(np.int32) for name, sizes in found.items()}


def masks(groups: int, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Valid rows per group of a masked GEMM."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, rows + 1, groups)
    one = np.where(np.arange(groups) == groups // 2, rows, 0)
    found = {
        "drawn": drawn,
        "none": 0 * drawn,
        "all": 0 * drawn + rows,
        "ones": 0 * drawn + 1,
        "one group": one,
        "beyond": np.where(one > 0, -1, rows + 7),
    }
    return {name: sizes.astype(np.int32) for name, sizes in found.items()}


# The tables -----------------------------------------------------------------------------------------------

FP8, NT, NN = "fp8_block", "bf16_nt", "bf16_nn"
TAIL = 77  # rows behind the last group, never aligned to anything


def contiguous_table() -> Iterator[Contiguous]:
    for groups, expected in CONTIGUOUS_TABLE:
        sizes = draw(groups, expected)
        rows, most = int(sizes.sum()) + TAIL, int(sizes.max())
        calls = ((FP8, "sizes", "bfloat16"), (NT, "sizes", "bfloat16"), (NN, "sizes", "bfloat16"))
        yield from (Contiguous(groups, rows, n, k, calls, most) for n, k in NK)


def aligned_table() -> Iterator[Contiguous]:
    """Groups that start at multiples of 128, gaps between them: an index per row, or ends of groups."""
    for index, (groups, expected) in enumerate(CONTIGUOUS_TABLE):
        sizes = draw(groups, expected)
        rows, most = int((-(-sizes // 128) * 128).sum()) + 128, int(sizes.max())
        calls = ((FP8, "index", "bfloat16"), (FP8, "ends", "bfloat16"), (NT, "index", "bfloat16"))
        n, k = NK[1 + index]
        yield Contiguous(groups, rows, n, k, calls, most, alignment=128)


def masked_table() -> Iterator[Masked]:
    for groups, expected, rows in MASKED_TABLE:
        most = int(draw(groups, expected).max())
        zero = "zero" if expected == 20 else ""
        calls = ((FP8, zero, "bfloat16"), (NT, "", "bfloat16"))
        yield from (Masked(groups, rows, n, k, calls, most) for n, k in NK)


def k_table() -> Iterator[KGrouped]:
    for groups, m, n, expected in K_TABLE:
        sizes = draw(groups, expected)
        calls = (
            ("fp8_nt", "add", "float32"),
            ("fp8_nt", "", "bfloat16"),
            ("bf16_tn", "add", "float32"),
            ("bf16_tn", "", "bfloat16"),
        )
        yield KGrouped(groups, m, n, int(sizes.sum()) + TAIL, calls, int(sizes.max()))


# Edge cases -----------------------------------------------------------------------------------------------

CONTIGUOUS_EDGES = (  # groups, rows, n, k
    (6, 700, 136, 192),
    (4, 1100, 576, 7296),
    (160, 900, 264, 256),
    (512, 1500, 128, 128),
    (1, 129, 8, 1000),
    (2, 300, 257, 130),
    (3, 2048, 1032, 640),
)
MASKED_EDGES = (
    (5, 100, 136, 192),
    (3, 200, 264, 7296),
    (160, 8, 128, 256),
    (1, 70, 8, 1000),
    (2, 130, 257, 130),
)
K_EDGES = (  # groups, m, n, k
    (6, 136, 72, 700),
    (4, 264, 200, 1500),
    (160, 72, 136, 900),
    (512, 8, 128, 600),
    (1, 128, 8, 129),
    (2, 257, 130, 300),
)


def contiguous_edges() -> Iterator[Contiguous]:
    for groups, rows, n, k in CONTIGUOUS_EDGES:
        for calls in (
            ((FP8, "sizes", "bfloat16"), ("fp8_row", "sizes", "float32"), (FP8, "index", "float32")),
            ((NT, "sizes", "bfloat16"), (NN, "sizes", "float32"), (NT, "ends", "float32")),
        ):
            yield Contiguous(groups, rows, n, k, calls, rows)


def masked_edges() -> Iterator[Masked]:
    for groups, rows, n, k in MASKED_EDGES:
        for calls in (
            ((FP8, "zero", "bfloat16"), (FP8, "", "float32"), ("fp8_row", "", "bfloat16")),
            ((NT, "zero", "bfloat16"), (NT, "", "float32")),
        ):
            yield Masked(groups, rows, n, k, calls, rows)


def k_edges() -> Iterator[KGrouped]:
    for groups, m, n, k in K_EDGES:
        for calls in (
            (("fp8_nt", "add", "float32"), ("fp8_nt", "", "bfloat16"), ("fp8_tn", "", "float32")),
            (("bf16_tn", "add", "float32"), ("bf16_tn", "", "bfloat16"), ("bf16_tn", "add", "bfloat16")),
        ):
            yield KGrouped(groups, m, n, k, calls, k)
