"""Shapes of layers of experts, for `precompile` and the command line: all kernels that the layer runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from jax_deepgemm.core.shapes import (
    DTYPES,
    LARGEST,
    MOST_GROUPS,
    RECIPES,
    Call,
    CallShape,
    choice,
    flag,
    layer_calls,
    size,
)
from jax_deepgemm.moe.decode import moe_mlp_decode
from jax_deepgemm.moe.layer import moe_mlp
from jax_deepgemm.ops.gemm.shapes import FROZEN_WEIGHTS, weight
from jax_deepgemm.ops.grouped.shapes import EXPERT_WEIGHTS, check_weights


@dataclass(frozen=True)
class _Experts(CallShape):
    """The sizes of a layer of experts."""

    tokens: int = size("rows of x")
    hidden: int = size("columns of x")
    intermediate: int = size("width of an expert: columns of gate, and of up")
    experts: int = size("experts whose weights are on the device", most=MOST_GROUPS)
    top_k: int = size("experts that each token goes to")


@dataclass(frozen=True)
class LayerShape(_Experts):
    """A layer of experts, with all that it runs: quantising, grouped GEMMs, SwiGLU, and their gradients."""

    OPS: ClassVar = ("moe_mlp",)
    LAYER: ClassVar = True
    recipe: str = choice("of the GEMMs", *RECIPES, default="fp8")
    dtype: str = choice("of x and of the result", *DTYPES, default="bfloat16")
    weights: str = choice("master weights, or quantised ones", *EXPERT_WEIGHTS, default="bfloat16")
    gradients: bool = flag("forward and backward too, not just forward", default=True)

    def __post_init__(self) -> None:
        check(self)

    def calls(self) -> list[Call]:
        def forward(x: Any, ids: Any, weights: Any, w13: Any, w2: Any) -> Any:
            return moe_mlp(x, ids, weights, w13, w2, recipe=self.recipe)

        trained = (0, 2) if self.weights in FROZEN_WEIGHTS else (0, 2, 3, 4)
        return layer_calls(forward, operands(self), trained, self.gradients)


@dataclass(frozen=True)
class DecodeShape(_Experts):
    """A layer of experts for decoding, with all that it runs: quantising, the masked GEMMs, SwiGLU."""

    OPS: ClassVar = ("moe_mlp_decode",)
    LAYER: ClassVar = True
    max_rows: int | None = size("rows of an expert, as the call says it (default tokens)", None)
    recipe: str = choice("of the GEMMs", *RECIPES, default="fp8")
    dtype: str = choice("of x and of the result", *DTYPES, default="bfloat16")
    weights: str | None = choice(
        "master weights, or quantised ones (default the recipe's)", *EXPERT_WEIGHTS, default=None
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", self.weights or ("fp8" if self.recipe == "fp8" else "bfloat16"))
        check(self)

    def calls(self) -> list[Call]:
        def decode(x: Any, ids: Any, weights: Any, w13: Any, w2: Any) -> Any:
            return moe_mlp_decode(x, ids, weights, w13, w2, recipe=self.recipe, max_rows=self.max_rows)

        return [Call(self.op, decode, operands(self))]


def check(shape: LayerShape | DecodeShape) -> None:
    """Raises:
    ValueError: fields that do not fit each other.
    """
    if shape.top_k > shape.experts:
        raise ValueError(f"top_k is {shape.top_k} and experts is {shape.experts}, need at most as many")
    if isinstance(shape, DecodeShape):
        rule, rows = "experts x max_rows", shape.experts * (shape.max_rows or shape.tokens)
    else:
        rule, rows = "tokens x top_k", shape.tokens * shape.top_k
    if rows > LARGEST:
        raise ValueError(f"{rule} is {rows}, need at most {LARGEST} rows")
    check_weights(shape.recipe, shape.weights, 2 * shape.intermediate, shape.hidden)


def operands(shape: LayerShape | DecodeShape) -> tuple[Any, ...]:
    """x, ids, weights of the router, w13, w2."""
    kind = shape.weights or "bfloat16"
    return (
        jax.ShapeDtypeStruct((shape.tokens, shape.hidden), shape.dtype),
        jax.ShapeDtypeStruct((shape.tokens, shape.top_k), "int32"),
        jax.ShapeDtypeStruct((shape.tokens, shape.top_k), "float32"),
        weight(kind, (shape.experts, 2 * shape.intermediate, shape.hidden)),
        weight(kind, (shape.experts, shape.hidden, shape.intermediate)),
    )


SHAPES = (LayerShape, DecodeShape)
