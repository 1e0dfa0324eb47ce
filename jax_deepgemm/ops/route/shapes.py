"""Shapes of routers, for `precompile` and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from jax_deepgemm.core.shapes import DTYPES, Call, CallShape, choice, flag, layer_calls, size
from jax_deepgemm.ops.route.api import route
from jax_deepgemm.ops.route.router import SCORES

READY = "ready"


@dataclass(frozen=True)
class RouteShape(CallShape):
    """The choice of experts for tokens, and the gradient of the logits."""

    OPS: ClassVar = ("route",)
    LAYER: ClassVar = True
    tokens: int = size("rows of the logits")
    experts: int = size("columns of the logits")
    top_k: int = size("experts that each token goes to")
    score: str = choice("what logits become", *(one or READY for one in SCORES), default="softmax")
    num_groups: int = size("equal runs of experts that limit the choice", 1)
    top_groups: int = size("groups that experts are chosen of", 1)
    dtype: str = choice("of the logits", *DTYPES, default="float32")
    bias: bool = flag("with a bias in the choice")
    gradients: bool = flag("forward and backward too, not just forward", default=True)

    def __post_init__(self) -> None:
        self.calls()

    def calls(self) -> list[Call]:
        logits = jax.ShapeDtypeStruct((self.tokens, self.experts), self.dtype)
        bias = [jax.ShapeDtypeStruct((self.experts,), "float32")] if self.bias else []
        groups: dict[str, Any] = {}
        if self.num_groups > 1:
            groups = {"num_groups": self.num_groups, "top_groups": self.top_groups}
        score = None if self.score == READY else self.score

        def forward(logits: Any, *bias: Any) -> Any:
            return route(logits, self.top_k, score=score, bias=bias[0] if bias else None, **groups)[1]

        return layer_calls(forward, (logits, *bias), (0,), self.gradients)


SHAPES = (RouteShape,)
