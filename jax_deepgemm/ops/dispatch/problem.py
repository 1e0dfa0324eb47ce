"""What a kernel that plans a dispatch is to compute."""

from __future__ import annotations

from dataclasses import dataclass

MOST_EXPERTS = 8192
"""Whose counts, of some warps, fit into shared memory."""
MOST_ROWS = 1 << 30
"""Of copies, and of rows: sums with the size of a grid are int32."""


@dataclass(frozen=True)
class DispatchProblem:
    """Copies that are sorted by expert.

    Attributes:
      copies: tokens times experts of a token.
      experts: number of experts.
      capacity: rows of each expert, used or not; 0: as many as it has copies.
    """

    copies: int
    experts: int
    capacity: int = 0

    def __str__(self) -> str:
        limit = f" capacity={self.capacity}" if self.capacity else ""
        return f"dispatch copies={self.copies} experts={self.experts}{limit}"

    @property
    def flops(self) -> int:
        """None that count: these kernels move bytes."""
        return 0
