"""The family of kernels that attend to keys in pages."""

from __future__ import annotations

from dataclasses import dataclass

from jax_deepgemm.core.family import Family
from jax_deepgemm.ops.attention.problem import AttentionProblem


@dataclass(frozen=True)
class AttentionConfig:
    """How few rows attend to many keys on a GPU; what `config=` takes.

    >>> print(AttentionConfig(keys=32, stages=3, blocks=1))
    4 warps x 32 keys stages=3 blocks=1

    Raises nothing; a call says which rules a configuration breaks.

    Attributes:
      keys: of a warp's tile, 16 or 32.
      stages: tiles that a warp has at a time.
      warps: of a block.
      blocks: of an SM.
    """

    keys: int
    stages: int
    warps: int = 4
    blocks: int = 1

    def __str__(self) -> str:
        return f"{self.warps} warps x {self.keys} keys stages={self.stages} blocks={self.blocks}"


FAMILY = Family("attention", AttentionProblem, {"9.0a": "jax_deepgemm.ops.attention.sm90.kernels"})
