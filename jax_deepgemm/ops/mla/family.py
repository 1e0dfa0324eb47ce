"""The family of kernels of latent attention."""

from __future__ import annotations

from dataclasses import dataclass

from jax_deepgemm.core.family import Family
from jax_deepgemm.ops.mla.problem import MlaProblem


@dataclass(frozen=True)
class MlaConfig:
    """How latent attention runs on a GPU. The cost model or a tuning file chooses; no call takes one.

    >>> print(MlaConfig(held=20, team=2))
    20 steps held, teams of 2

    Raises nothing.

    Attributes:
      held: steps of 16 numbers of the queries that are in registers, up to 24. With some, the warpgroup that
        has them adds up a quarter of the values, else half.
      team: blocks that read the same keys at the same time, each for 64 rows (token x head): 1, 2 or 4.
    """

    team: int = 1
    held: int = 20

    def __str__(self) -> str:
        return f"{self.held} steps held, teams of {self.team}"


FAMILY = Family("mla", MlaProblem, {"9.0a": "jax_deepgemm.ops.mla.sm90"})
