"""What a kernel that moves rows is to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowsProblem:
    """Rows that are taken by an index.

    Attributes:
      rows: how many are wanted.
      rows_from: how many there are.
      row_bytes: of each.
      scale_bytes: of each row's scales, which come along; 0: none.
    """

    rows: int
    rows_from: int
    row_bytes: int
    scale_bytes: int = 0

    def __str__(self) -> str:
        scales = f" + {self.scale_bytes}" if self.scale_bytes else ""
        return f"take {self.rows} of {self.rows_from} rows of {self.row_bytes}{scales} bytes"

    @property
    def flops(self) -> int:
        """None: these kernels move bytes."""
        return 0
