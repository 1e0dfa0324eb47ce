"""What a kernel that computes an activation, or its gradient, is to do."""

from __future__ import annotations

from dataclasses import dataclass

from jax_deepgemm.ops.quantize.activation import SILU, Activation

COMPUTED = ("bfloat16", "float16", "float32")
"""Types of numbers that the kernels read and write."""


@dataclass(frozen=True)
class SwigluProblem:
    """An activation that is not quantised.

    Attributes:
      kind: "act" (act of h) or "grad" (the gradients of h and of the weights).
      rows: of all matrices.
      width: features of act.
      x: dtype of h, act and their gradients.
      weighted: rows have weights.
      activation: which one.
    """

    kind: str
    rows: int
    width: int
    x: str = "bfloat16"
    weighted: bool = False
    activation: Activation = SILU

    def __str__(self) -> str:
        parts = ["swiglu", self.kind, *([self.activation.tag] if self.activation.tag else [])]
        weights = " weights" if self.weighted else ""
        return f"{' '.join(parts)} {self.rows}x{self.width} {self.x}{weights}"

    @property
    def flops(self) -> int:
        """None that count: these kernels move bytes."""
        return 0

    @property
    def aligned(self) -> bool:
        """Eight neighbouring features can be moved at once."""
        return self.width % 8 == 0
