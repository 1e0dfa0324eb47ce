"""What a kernel that finds the largest numbers of rows is to compute."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = ("float32", "bfloat16", "float16")
"""Of rows."""
MOST_COLUMNS = 1 << 20
"""A column has 20 bits of a candidate (include/jax_deepgemm/topk/topk.cuh)."""
MOST_CHOSEN = 2048
"""Which are sorted in shared memory."""
MOST_ROWS = 1 << 27
"""With up to 16 blocks of threads each."""


@dataclass(frozen=True)
class TopkProblem:
    """The k largest numbers of every row.

    Attributes:
      rows, columns: of the numbers.
      k: how many are found in each row.
      dtype: of the numbers.
      windows: whether rows have a first and a last column of their own.
      values: whether the numbers are wanted, and not their columns alone.
      by_index: whether they are in the order of their columns, not the largest first.
    """

    rows: int
    columns: int
    k: int
    dtype: str = "float32"
    windows: bool = False
    values: bool = False
    by_index: bool = False

    def __str__(self) -> str:
        flags = {"windows": self.windows, "values": self.values, "by index": self.by_index}
        given = [name for name, on in flags.items() if on]
        return " ".join([f"top {self.k} of {self.rows}x{self.columns} {self.dtype}", *given])

    @property
    def flops(self) -> int:
        """None that count: these kernels move bytes."""
        return 0


def beyond(rows: int, columns: int, k: int) -> str:
    """Which limit of the kernel a call is beyond, "" if none.

    >>> beyond(8, 1 << 20, 2048), beyond(8, 4096, 4096)
    ('', 'k is 4096, the kernel takes 2048')
    """
    counts = (
        ("there are {} rows", rows, MOST_ROWS),
        ("rows have {} columns", columns, MOST_COLUMNS),
        ("k is {}", k, MOST_CHOSEN),
    )
    return next((f"{what.format(n)}, the kernel takes {most}" for what, n, most in counts if n > most), "")
