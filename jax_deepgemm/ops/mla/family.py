"""The family of kernels of latent attention."""

from __future__ import annotations

from dataclasses import dataclass

from jax_deepgemm.core.family import Family
from jax_deepgemm.ops.mla.problem import MlaProblem


@dataclass(frozen=True)
class MlaConfig:
    """How latent attention runs on a GPU; what `config=` takes.

    >>> print(MlaConfig(keys=64, team=2))
    64 keys, teams of 2

    Raises nothing; a call says which rules a configuration breaks.

    Attributes:
      keys: of a tile, 32 or 64.
      team: blocks that read the same keys at the same time, each for 64 rows (token x head): 1, 2 or 4.
    """

    keys: int
    team: int = 1

    def __str__(self) -> str:
        return f"{self.keys} keys, teams of {self.team}"


FAMILY = Family("mla", MlaProblem, {"9.0a": "jax_deepgemm.ops.mla.sm90"})
