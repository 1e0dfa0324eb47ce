"""How shapes files and the command line name the call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax

from jax_deepgemm.core.shapes import Call, CallShape, size
from tests.shared.toy_family.op import scale


@dataclass(frozen=True)
class ScaleShape(CallShape):
    """Columns of x scaled by w."""

    OPS: ClassVar = ("toy_scale",)
    m: int = size("rows of x")
    k: int = size("columns of x")

    def calls(self) -> list[Call]:
        x, w = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((self.m, self.k), (self.k,)))
        return [Call(self.op, scale, (x, w))]


SHAPES = (ScaleShape,)
