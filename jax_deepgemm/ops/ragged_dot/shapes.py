"""Shapes of ragged_dot, for `precompile` and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from jax_deepgemm.core.shapes import DTYPES, MOST_GROUPS, Call, CallShape, choice, flag, layer_calls, size
from jax_deepgemm.ops.grouped.shapes import equal_sizes
from jax_deepgemm.ops.ragged_dot.api import ragged_dot


@dataclass(frozen=True)
class RaggedDotShape(CallShape):
    """jax.lax.ragged_dot in bfloat16, lhs [m, k] and rhs [groups, k, n], by default with its gradients."""

    OPS: ClassVar = ("ragged_dot",)
    LAYER: ClassVar = True
    groups: int = size("groups, each with its own matrix of rhs", most=MOST_GROUPS)
    m: int = size("rows of lhs, of all groups together")
    n: int = size("columns of the result")
    k: int = size("columns of lhs")
    expected_m: int | None = size("rows of a typical group, as the call says it (default m / groups)", None)
    out_dtype: str = choice("of the result", *DTYPES, default="bfloat16")
    gradients: bool = flag("forward and backward too, not just forward", default=True)

    def calls(self) -> list[Call]:
        lhs = jax.ShapeDtypeStruct((self.m, self.k), "bfloat16")
        rhs = jax.ShapeDtypeStruct((self.groups, self.k, self.n), "bfloat16")

        def forward(lhs: Any, rhs: Any, sizes: Any) -> Any:
            return ragged_dot(
                lhs, rhs, sizes, preferred_element_type=self.out_dtype, expected_m=self.expected_m
            )

        operands = (lhs, rhs, equal_sizes(self.groups, self.m))
        return layer_calls(forward, operands, (0, 1), self.gradients)


SHAPES = (RaggedDotShape,)
