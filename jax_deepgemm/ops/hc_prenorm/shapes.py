"""Shapes of projections of wide rows, for `precompile` and the command line."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax

from jax_deepgemm.core.shapes import Call, CallShape, size
from jax_deepgemm.ops.hc_prenorm.api import hc_prenorm_gemm
from jax_deepgemm.ops.hc_prenorm.family import MOST_SPLITS


@dataclass(frozen=True)
class HcPrenormShape(CallShape):
    """A projection of rows and the sums of their squares."""

    OPS: ClassVar = ("hc_prenorm_gemm",)
    m: int = size("rows of A and D")
    n: int = size("columns of D, rows of B")
    k: int = size("columns of A and B")
    num_splits: int | None = size("parts of k whose sums are wanted", default=None, most=MOST_SPLITS)

    def calls(self) -> list[Call]:
        a = jax.ShapeDtypeStruct((self.m, self.k), "bfloat16")
        b = jax.ShapeDtypeStruct((self.n, self.k), "float32")
        return [Call(self.op, functools.partial(hc_prenorm_gemm, num_splits=self.num_splits), (a, b))]


SHAPES = (HcPrenormShape,)
