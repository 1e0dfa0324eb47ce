"""The family of kernels that project wide rows and sum their squares."""

from __future__ import annotations

from dataclasses import dataclass

from jax_deepgemm.core.family import Family

BLOCK = 64
"""Numbers of k that are multiplied at once; k is split at multiples of it."""
MOST_COLUMNS, MOST_SPLITS = 256, 1024
LARGEST = 2**31 - 128
"""Rows, and numbers of one row: they, and the last tile's end, are counted in int32."""


@dataclass(frozen=True)
class HcPrenormProblem:
    """D [m, n] of A [m, k] bfloat16 and B [n, k] float32, and the sums of squares of A's rows.

    Attributes:
      m, n, k: sizes.
      num_splits: parts of k whose sums are results; 0: the whole sums are.
    """

    m: int
    n: int
    k: int
    num_splits: int = 0

    def __str__(self) -> str:
        splits = f" splits={self.num_splits}" if self.num_splits else ""
        return f"hc_prenorm m={self.m} n={self.n} k={self.k}{splits}"

    @property
    def flops(self) -> int:
        """Of the product."""
        return 2 * self.m * self.n * self.k

    @property
    def blocks(self) -> int:
        """Of k.

        >>> HcPrenormProblem(8, 24, 100).blocks
        2
        """
        return -(-self.k // BLOCK)


@dataclass(frozen=True)
class HcPrenormConfig:
    """How rows and k are cut on a GPU; what `config=` of `hc_prenorm_gemm` takes.

    >>> print(HcPrenormConfig(rows=128, groups=2, stages=8, splits=2))
    128 rows x 2 groups stages=8 splits=2

    Raises nothing; a call says which rules a configuration breaks.

    Attributes:
      rows: of A in a tile, 64, 128 or 256, with a warpgroup for every 64.
      groups: how many such sets of warpgroups take blocks of k in turns: 1, 2 or 4.
      stages: slots of 64 numbers of k each, a multiple of groups.
      splits: parts of k, which different blocks of threads sum.
    """

    rows: int
    groups: int
    stages: int
    splits: int

    def __str__(self) -> str:
        return f"{self.rows} rows x {self.groups} groups stages={self.stages} splits={self.splits}"


def beyond(m: int, k: int, n: int) -> str:
    """Which limit of the kernel a call is beyond, "" if none.

    >>> beyond(4096, 28672, 24), beyond(4096, 28672, 300)
    ('', 'n is 300, the kernel takes 256')
    """
    counts = (("m", m, LARGEST), ("n", n, MOST_COLUMNS), ("k", k, LARGEST))
    return next(
        (f"{name} is {size}, the kernel takes {most}" for name, size, most in counts if size > most), ""
    )


FAMILY = Family("hc_prenorm", HcPrenormProblem, {"9.0a": "jax_deepgemm.ops.hc_prenorm.sm90"})
