"""The family of kernels that make small matrices doubly stochastic."""

from __future__ import annotations

from dataclasses import dataclass

from jax_deepgemm.core.family import Family

LARGEST, MOST_ITERATIONS = 8, 32
"""Rows of a matrix, which a thread has in registers; iterations, whose sums a block has in shared memory."""
MOST_MATRICES = 2**31 - 1


@dataclass(frozen=True)
class SinkhornProblem:
    """What is computed, of how many matrices.

    Attributes:
      kind: "sinkhorn" or "sinkhorn_gradient" (that of the logits).
      matrices, n: how many, of n rows and columns.
      iterations: how often columns are divided.
      eps: added to the softmax and to the sums.
    """

    kind: str
    matrices: int
    n: int
    iterations: int
    eps: float

    def __str__(self) -> str:
        return f"{self.kind} {self.matrices}x{self.n}x{self.n} iterations={self.iterations} eps={self.eps:g}"

    @property
    def flops(self) -> int:
        """None that count: these kernels move bytes."""
        return 0


def beyond(n: int, iterations: int) -> str:
    """Which limit of the kernels a call is beyond, "" if none.

    >>> beyond(4, 20), beyond(16, 20)
    ('', 'matrices have 16 rows, the kernels take 8')
    """
    counts = (("matrices have {} rows", n, LARGEST), ("there are {} iterations", iterations, MOST_ITERATIONS))
    return next((f"{what.format(n)}, the kernels take {most}" for what, n, most in counts if n > most), "")


FAMILY = Family("sinkhorn", SinkhornProblem, {"9.0a": "jax_deepgemm.ops.sinkhorn.sm90"})
