"""What a router does, as static data."""

from __future__ import annotations

from dataclasses import dataclass

SCORES = ("softmax", "sigmoid", "sqrt_softplus", None)


@dataclass(frozen=True)
class Router:
    """The options of `route`.

    Attributes:
      top_k: experts per token.
      score: one of SCORES; None: logits are scores already.
      num_groups: equal runs of neighbouring experts; 1 where the choice is free.
      top_groups: groups whose experts can be chosen.
      renormalize: whether a token's weights are divided by their sum.
      scale: factor of the weights.
    """

    top_k: int
    score: str | None = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    renormalize: bool = True
    scale: float = 1.0

    @property
    def grouped(self) -> bool:
        """Whether there is an expert that its group keeps from being chosen."""
        return self.top_groups < self.num_groups
