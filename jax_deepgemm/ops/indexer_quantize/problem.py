"""What a kernel that quantises an indexer's rows is to compute."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = ("bfloat16", "float16", "float32")
DEPTHS = (32, 64, 128)
"""Columns of a row."""
SCALE_BYTES = 4


@dataclass(frozen=True)
class RotateProblem:
    """Rows in FP8, each with a scale.

    Attributes:
      rows, depth: of x.
      dtype: of x.
      rotate: whether rows are rotated before.
      powers: scales are powers of two.
      pages, page: of a cache that rows go to, and slots of a page; 0: they go to an array.
      joined: a page is its values and then its scales, in one array of bytes.
    """

    rows: int
    depth: int
    dtype: str = "bfloat16"
    rotate: bool = True
    powers: bool = False
    pages: int = 0
    page: int = 0
    joined: bool = False

    def __str__(self) -> str:
        flags = {"rotated": self.rotate, "ue8m0": self.powers, "joined": self.joined}
        flags |= {f"to {self.pages} pages of {self.page}": self.pages > 0}
        given = [name for name, on in flags.items() if on]
        return " ".join([f"rows {self.rows}x{self.depth} {self.dtype}", *given])

    @property
    def flops(self) -> int:
        """None that count: these kernels move bytes."""
        return 0
