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
      slots: experts of a token, where each row's token and weight are wanted instead of its copy, in the
        first launch of a chain; 0: elsewhere.
    """

    copies: int
    experts: int
    capacity: int = 0
    slots: int = 0

    def __str__(self) -> str:
        limit = f" capacity={self.capacity}" if self.capacity else ""
        rows = f" slots={self.slots} chained" if self.slots else ""
        return f"dispatch copies={self.copies} experts={self.experts}{limit}{rows}"

    @property
    def flops(self) -> int:
        """None that count: these kernels move bytes."""
        return 0
