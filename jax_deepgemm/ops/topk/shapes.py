"""Shapes of the largest numbers of rows, for `precompile` and the command line."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from jax_deepgemm.core.shapes import Call, CallShape, choice, flag, size
from jax_deepgemm.ops.topk.api import ORDERS, topk
from jax_deepgemm.ops.topk.problem import DTYPES


@dataclass(frozen=True)
class TopkShape(CallShape):
    """The k largest numbers of every row."""

    OPS: ClassVar = ("topk",)
    LAYER: ClassVar = True
    rows: int = size("rows of the numbers")
    columns: int = size("numbers of a row")
    k: int = size("how many of them are wanted")
    dtype: str = choice("of the numbers", *DTYPES, default="float32")
    order: str = choice("of the result", *ORDERS, default="value")
    windows: bool = flag("rows have a first and a last column of their own")
    values: bool = flag("the numbers too, not just their columns")

    def calls(self) -> list[Call]:
        x = jax.ShapeDtypeStruct((self.rows, self.columns), self.dtype)
        bounds = [jax.ShapeDtypeStruct((self.rows,), "int32")] * 2 if self.windows else []
        run: Any = functools.partial(topk, k=self.k, order=self.order, values=self.values)

        def function(x: jax.Array, *bounds: jax.Array) -> Any:
            return run(x, **dict(zip(("start", "end"), bounds)))

        return [Call("topk", function, (x, *bounds))]


SHAPES = (TopkShape,)
