"""The family of routing kernels: the choice of experts, and the gradient of their weights."""

from __future__ import annotations

from dataclasses import dataclass

from jax_deepgemm.core.family import Family
from jax_deepgemm.ops.route.router import Router

MOST_EXPERTS = 2048
MOST_CHOSEN = 32
MOST_GROUPS = 32


@dataclass(frozen=True)
class RouteProblem:
    """What is computed for how many tokens.

    Attributes:
      kind: "route" (ids and weights of logits) or "route_gradient" (that of the logits).
      tokens, experts: of the logits.
      router: which experts are chosen, and what their weights are.
      x: dtype of the logits.
      biased: whether an operand is added to the scores in the choice.
    """

    kind: str
    tokens: int
    experts: int
    router: Router
    x: str = "float32"
    biased: bool = False

    def __str__(self) -> str:
        r = self.router
        flags = {
            f"groups {r.top_groups} of {r.num_groups}": r.grouped,
            "bias": self.biased,
            "renormalized": r.renormalize,
            f"scale={r.scale:g}": r.scale != 1,
        }
        parts = [
            self.kind,
            f"{self.tokens}x{self.experts}",
            f"top {r.top_k}",
            r.score or "ready scores",
            self.x,
        ]
        return " ".join([*parts, *(name for name, on in flags.items() if on)])

    @property
    def flops(self) -> int:
        """None that count: these kernels move bytes."""
        return 0


def beyond(experts: int, router: Router) -> str:
    """Which limit of the kernels a router is beyond, "" if none.

    >>> beyond(256, Router(8)), beyond(4096, Router(8))
    ('', 'there are 4096 experts, the kernels take 2048')
    """
    counts = (
        ("there are {} experts", experts, MOST_EXPERTS),
        ("top_k is {}", router.top_k, MOST_CHOSEN),
        ("num_groups is {}", router.num_groups if router.grouped else 1, MOST_GROUPS),
    )
    return next((f"{what.format(n)}, the kernels take {most}" for what, n, most in counts if n > most), "")


FAMILY = Family("route", RouteProblem, {"9.0a": "jax_deepgemm.ops.route.sm90"})
