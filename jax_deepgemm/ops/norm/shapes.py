"""Shapes of norms, for `precompile` and the command line."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from jax_deepgemm.core.shapes import Call, CallShape, choice, flag, size
from jax_deepgemm.ops.norm.op import norm_rows
from jax_deepgemm.ops.norm.problem import DTYPES, SCALE_FORMATS
from jax_deepgemm.ops.norm.reference import KINDS


@dataclass(frozen=True)
class NormShape(CallShape):
    """Norms as layers call them: of a sum that goes on, in the type of x, in FP8, or in both."""

    OPS: ClassVar = ("norm",)
    LAYER: ClassVar = True
    tokens: int = size("rows of x")
    hidden: int = size("numbers of a row")
    kind: str = choice("which norm", *KINDS, default="rms")
    dtype: str = choice("of x, gamma and beta", *DTYPES, default="bfloat16")
    residual: bool = flag("x + residual is normalised, and a result", default=True)
    normed: bool = flag("the norm is a result", default=True)
    fp8: str = choice(
        "scales of the norm in FP8, if that is a result", "none", *SCALE_FORMATS, default="none"
    )

    def calls(self) -> list[Call]:
        rows, vector = (
            jax.ShapeDtypeStruct(shape, self.dtype) for shape in ((self.tokens, self.hidden), (self.hidden,))
        )
        form: dict[str, Any] = {
            "kind": self.kind,
            "eps": 1e-5,
            "scales": "" if self.fp8 == "none" else self.fp8,
        }
        form |= {"normed": self.normed or self.fp8 == "none", "summed": self.residual}

        def run(x: Any, gamma: Any, beta: Any = None, residual: Any = None, **given: Any) -> Any:
            return norm_rows(x, residual, (None, gamma, beta), **given)

        operands = [rows, vector, vector if self.kind == "layer" else None, rows if self.residual else None]
        return [Call("norm", functools.partial(run, **form), tuple(operands))]


SHAPES = (NormShape,)
