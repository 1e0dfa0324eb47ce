"""What a kernel that moves rows is to do."""

from __future__ import annotations

from dataclasses import dataclass

SUMMED = ("bfloat16", "float16", "float32")
"""Types of numbers that a kernel sums."""


@dataclass(frozen=True)
class RowsProblem:
    """Rows that are taken by an index, copied to where they are wanted, or summed.

    Attributes:
      rows: how many are wanted.
      rows_from: how many there are.
      row_bytes: of each.
      scale_bytes: of each row's scales, which come along; 0: none.
      slots: rows that are summed for each that is wanted; 0: it is taken as it is.
      dtype: of numbers that are summed.
      copies: of each row at most, where a table says which rows are copies of it; 0: an index alone says it.
      chained: sums are the last launch of a chain (core/chain.py), and read what the one before gives.
    """

    rows: int
    rows_from: int
    row_bytes: int
    scale_bytes: int = 0
    slots: int = 0
    dtype: str = ""
    copies: int = 0
    chained: bool = False

    def __str__(self) -> str:
        if self.slots:
            what = f"{self.rows} sums of {self.slots}"
            chained = " chained" if self.chained else ""
            return f"{what} of {self.rows_from} rows of {self.row_bytes} bytes {self.dtype}{chained}"
        if self.copies:
            what = f"copy {self.rows_from} rows of {self.row_bytes} bytes"
            return f"{what} to {self.copies} each of {self.rows}"
        scales = f" + {self.scale_bytes}" if self.scale_bytes else ""
        return f"take {self.rows} of {self.rows_from} rows of {self.row_bytes}{scales} bytes"

    @property
    def flops(self) -> int:
        """None that count: these kernels move bytes."""
        return 0
