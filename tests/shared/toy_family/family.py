"""What the kernel is to compute, and how it may be cut."""

from __future__ import annotations

from dataclasses import dataclass

from jax_deepgemm.core.family import Family


@dataclass(frozen=True)
class ScaleProblem:
    """Rows and columns of x."""

    rows: int
    cols: int

    @property
    def flops(self) -> int:
        return self.rows * self.cols

    def __str__(self) -> str:
        return f"scale {self.rows}x{self.cols}"


@dataclass(frozen=True)
class ScaleConfig:
    """Threads of a block."""

    threads: int

    def __str__(self) -> str:
        return f"threads={self.threads}"


FAMILY = Family("toy", ScaleProblem, {"8.0": "tests.shared.toy_family.kernels"})
