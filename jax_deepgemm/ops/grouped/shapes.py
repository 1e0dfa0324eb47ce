"""Shapes of grouped GEMMs, for `precompile` and the command line; groups have equal sizes there."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np

from jax_deepgemm.core.shapes import (
    BLOCKS,
    DTYPES,
    MOST_GROUPS,
    RECIPES,
    WEIGHTS,
    Call,
    CallShape,
    choice,
    flag,
    layer_calls,
    size,
)
from jax_deepgemm.ops.gemm.shapes import (
    ACTIVATIONS,
    FROZEN_WEIGHTS,
    a_block,
    check_ends,
    check_fp4,
    instead_of,
    matrix,
    operand_b,
    weight,
    with_epilogue,
)
from jax_deepgemm.ops.grouped import api, gathered
from jax_deepgemm.ops.grouped.linear import grouped_linear

EXPERT_WEIGHTS = (*WEIGHTS, "fp4", "nvfp4")


def equal_sizes(groups: int, total: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Sizes of groups, as equal as can be.

    >>> equal_sizes(3, 8).tolist()
    [3, 3, 2]
    """
    return (np.arange(groups) < total % groups).astype(np.int32) + np.int32(total // groups)


@dataclass(frozen=True)
class ContiguousShape(CallShape):
    """Groups of rows, one after the other: D[rows of g] = A[rows of g] x B[g]."""

    OPS: ClassVar = tuple(
        f"m_grouped_{kind}_gemm_{form}_contiguous" for kind in ("fp8", "bf16") for form in ("nt", "nn")
    )
    groups: int = size("groups, each with its own B", most=MOST_GROUPS)
    m: int = size("rows of A and D, of all groups together")
    n: int = size("columns of each B and of D")
    k: int = size("columns of A, rows of each B")
    expected_m: int | None = size("rows of a typical group, as the call says it (default m / groups)", None)
    out_dtype: str = choice("of D", *DTYPES, default="bfloat16")
    b_block: str = choice("FP8: elements of B (n x k) per scale", *BLOCKS, default="128x128")
    weights: str = choice("types of a quantised B", *FROZEN_WEIGHTS, default="fp8")
    activation: str = choice("epilogue", *ACTIVATIONS, default="none")
    bias: bool = flag("epilogue: with a bias of each group")
    quantised: bool = flag("epilogue: D in FP8 with 1x128 scales")

    def __post_init__(self) -> None:
        check_product(self.weights, self.op, self.n)
        check_ends(self)

    def calls(self) -> list[Call]:
        fp8, op = "fp8" in self.op, getattr(api, self.op)
        a = matrix(fp8, (self.m, self.k), True, a_block(self.b_block))
        b = operand_b(self.op, self.weights, (self.groups, self.n, self.k), self.b_block)

        product = functools.partial(op, expected_m=self.expected_m, out_dtype=self.out_dtype)
        function, bias = with_epilogue(product, self, (self.groups, self.n))
        return [Call(self.op, function, (a, b, equal_sizes(self.groups, self.m), *bias))]


@dataclass(frozen=True)
class MaskedShape(CallShape):
    """Equal storage for each group: D[g, :rows] = A[g, :rows] x B[g]."""

    OPS: ClassVar = ("m_grouped_fp8_gemm_nt_masked", "m_grouped_bf16_gemm_nt_masked")
    groups: int = size("groups, each with its own A and B", most=MOST_GROUPS)
    m: int = size("rows of A and D that each group has room for")
    n: int = size("columns of each B and of D")
    k: int = size("columns of A, rows of each B")
    expected_m: int | None = size("rows of a typical group, as the call says it (default m)", None)
    zero_rows: bool = flag("rows that do not count are written as zeros")
    out_dtype: str = choice("of D", *DTYPES, default="bfloat16")
    b_block: str = choice("FP8: elements of B (n x k) per scale", *BLOCKS, default="128x128")
    weights: str = choice("types of a quantised B", *FROZEN_WEIGHTS, default="fp8")
    activation: str = choice("epilogue", *ACTIVATIONS, default="none")
    bias: bool = flag("epilogue: with a bias of each group")
    quantised: bool = flag("epilogue: D in FP8 with 1x128 scales")

    def __post_init__(self) -> None:
        check_product(self.weights, self.op, self.n)
        check_ends(self)

    def calls(self) -> list[Call]:
        fp8, op = "fp8" in self.op, getattr(api, self.op)
        a = matrix(fp8, (self.groups, self.m, self.k), True, a_block(self.b_block))
        b = operand_b(self.op, self.weights, (self.groups, self.n, self.k), self.b_block)
        counts = np.full(self.groups, min(self.m, self.expected_m or self.m), np.int32)

        hints = {"expected_m": self.expected_m, "zero_rows": self.zero_rows}
        product = functools.partial(op, **hints, out_dtype=self.out_dtype)
        function, bias = with_epilogue(product, self, (self.groups, self.n))
        return [Call(self.op, function, (a, b, counts, *bias))]


@dataclass(frozen=True)
class InnerShape(CallShape):
    """Groups of k, the weight gradient: D[g] = A[k of g] x B[k of g], with C if it accumulates."""

    OPS: ClassVar = (
        "k_grouped_fp8_gemm_nt_contiguous",
        "k_grouped_fp8_gemm_tn_contiguous",
        "k_grouped_bf16_gemm_tn_contiguous",
    )
    groups: int = size("groups, each with its own D", most=MOST_GROUPS)
    m: int = size("rows of each D")
    n: int = size("columns of each D")
    k: int = size("the extent that is summed over, of all groups together")
    out_dtype: str = choice("of D", *DTYPES, default="float32")
    accumulate: bool = flag("with C")

    def calls(self) -> list[Call]:
        fp8, k_last, op = "fp8" in self.op, "_nt_" in self.op, getattr(api, self.op)
        a, b = (matrix(fp8, (rows, self.k), k_last, (1, 128)) for rows in (self.m, self.n))
        c = jax.ShapeDtypeStruct((self.groups, self.m, self.n), self.out_dtype) if self.accumulate else None

        def function(a: Any, b: Any, c: Any, sizes: Any) -> Any:
            return op(a, b, sizes, c, out_dtype=self.out_dtype)

        operands = (a, b, c, equal_sizes(self.groups, self.k))
        return [Call(self.op, function, operands, carry=2 if self.accumulate else None)]


@dataclass(frozen=True)
class GatheredShape(CallShape):
    """Groups of rows that an index names: D[i] = A[rows[i]] x B[g], with row i in group g."""

    OPS: ClassVar = tuple(
        f"m_grouped_{form}_gathered" for form in ("fp8_gemm_nt", "bf16_gemm_nt", "bf16_gemm_nn")
    )
    groups: int = size("groups, each with its own B", most=MOST_GROUPS)
    tokens: int = size("rows of A")
    m: int = size("rows of D, of all groups together: uses of rows of A")
    n: int = size("columns of each B and of D")
    k: int = size("columns of A, rows of each B")
    expected_m: int | None = size("rows of a typical group, as the call says it (default m / groups)", None)
    out_dtype: str = choice("of D", *DTYPES, default="bfloat16")
    b_block: str = choice("FP8: elements of B (n x k) per scale", "128x128", "1x128", default="128x128")

    def calls(self) -> list[Call]:
        fp8, op = "fp8" in self.op, getattr(gathered, self.op)
        a = matrix(fp8, (self.tokens, self.k), True, (1, 128))
        b = operand_b(self.op, "fp8", (self.groups, self.n, self.k), self.b_block)
        rows = np.arange(self.m, dtype=np.int32) % max(1, self.tokens)

        def function(a: Any, b: Any, rows: Any, sizes: Any) -> Any:
            return op(a, b, rows, sizes, expected_m=self.expected_m, out_dtype=self.out_dtype)

        return [Call(self.op, function, (a, b, rows, equal_sizes(self.groups, self.m)))]


@dataclass(frozen=True)
class GatheredInnerShape(CallShape):
    """Groups of k of which an index names A's rows: D[g] = A[rows of g] x B[k of g]."""

    OPS: ClassVar = ("k_grouped_bf16_gemm_tn_gathered", "k_grouped_fp8_gemm_tn_gathered")
    groups: int = size("groups, each with its own D", most=MOST_GROUPS)
    tokens: int = size("rows of A")
    m: int = size("rows of each D")
    n: int = size("columns of each D")
    k: int = size("the extent that is summed over, of all groups together: uses of rows of A")
    out_dtype: str = choice("of D", *DTYPES, default="float32")

    def calls(self) -> list[Call]:
        a, b = (matrix(False, shape, False, (1, 128)) for shape in ((self.m, self.tokens), (self.n, self.k)))
        rows = np.arange(self.k, dtype=np.int32) % max(1, self.tokens)

        def function(a: Any, b: Any, rows: Any, sizes: Any) -> Any:
            op = getattr(gathered, self.op)
            return op(a, b, sizes, a_rows=rows, out_dtype=self.out_dtype)

        return [Call(self.op, function, (a, b, rows, equal_sizes(self.groups, self.k)))]


@dataclass(frozen=True)
class GroupedLinearShape(CallShape):
    """A linear layer for each group of rows, with the quantising and, by default, the gradients."""

    OPS: ClassVar = ("grouped_linear",)
    LAYER: ClassVar = True
    groups: int = size("groups, each with its own weight", most=MOST_GROUPS)
    m: int = size("rows of x, of all groups together")
    n: int = size("features of y")
    k: int = size("features of x")
    expected_m: int | None = size("rows of a typical group, as the call says it (default m / groups)", None)
    recipe: str = choice("of the GEMMs", *RECIPES, default="fp8")
    dtype: str = choice("of x", *DTYPES, default="bfloat16")
    out_dtype: str = choice("of y", *DTYPES, default="bfloat16")
    weights: str = choice("master weights, or quantised ones", *EXPERT_WEIGHTS, default="bfloat16")
    gradients: bool = flag("forward and backward too, not just forward", default=True)

    def __post_init__(self) -> None:
        check_weights(self.recipe, self.weights, self.n)

    def calls(self) -> list[Call]:
        x = jax.ShapeDtypeStruct((self.m, self.k), self.dtype)
        w = weight(self.weights, (self.groups, self.n, self.k))

        def forward(x: Any, w: Any, sizes: Any) -> Any:
            return grouped_linear(
                x, w, sizes, recipe=self.recipe, expected_m=self.expected_m, out_dtype=self.out_dtype
            )

        trained = (0,) if self.weights in FROZEN_WEIGHTS else (0, 1)
        return layer_calls(forward, (x, w, equal_sizes(self.groups, self.m)), trained, self.gradients)


def check_product(weights: str, op: str, n: int) -> None:
    """Raises:
    ValueError: FP4 weights for a product that has none, or rows of them that make no slabs.
    """
    check_fp4(weights, n, refused=instead_of(op, weights))


def check_weights(recipe: str, weights: str | None, *rows: int) -> None:
    """Raises:
    ValueError: quantised weights for a recipe that cannot take them; rows of FP4 weights that make no slabs.
    """
    if recipe == "bf16" and weights == "fp8":
        raise ValueError("weights is 'fp8' and recipe is 'bf16', need recipe fp8, or weights bfloat16")
    if recipe == "fp8" and weights == "nvfp4":
        raise ValueError("weights is 'nvfp4' and recipe is 'fp8', need recipe bf16, or weights fp4")
    check_fp4(weights or "", *rows)


SHAPES = (ContiguousShape, MaskedShape, InnerShape, GatheredShape, GatheredInnerShape, GroupedLinearShape)
