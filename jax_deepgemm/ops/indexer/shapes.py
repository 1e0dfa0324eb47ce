"""Shapes of logits, for `precompile`, `tune` and the command line."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from jax_deepgemm.core.shapes import DTYPES, RECIPES, Call, CallShape, choice, flag, size
from jax_deepgemm.ops.indexer.api import bf16_mqa_logits, mqa_logits


@dataclass(frozen=True)
class LogitsShape(CallShape):
    """Scores of keys for tokens."""

    OPS: ClassVar = ("mqa_logits",)
    tokens: int = size("rows of the logits")
    keys: int = size("columns of the logits")
    heads: int = size("of a token", 64)
    depth: int = size("numbers of a head, and of a key", 128)
    recipe: str = choice("types of the operands", *RECIPES, default="fp8")
    out: str = choice("of the logits", *DTYPES, default="float32")
    compressed: bool = flag("rows begin with the first key of their window")

    def __post_init__(self) -> None:
        self.calls()

    def calls(self) -> list[Call]:
        def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        kind = "float8_e4m3fn" if self.recipe == "fp8" else "bfloat16"
        q, kv = (
            array(self.tokens, self.heads, self.depth, dtype=kind),
            array(self.keys, self.depth, dtype=kind),
        )
        weights, bound = array(self.tokens, self.heads), array(self.tokens, dtype="int32")
        options: dict[str, Any] = {"compressed": self.compressed, "out_dtype": self.out}
        if self.recipe == "bf16":
            function = functools.partial(bf16_mqa_logits, **options)
            return [Call("logits", function, (q, kv, weights, bound, bound))]
        quantised = functools.partial(mqa_logits, **options)
        return [Call("logits", quantised, (q, (kv, array(self.keys)), weights, bound, bound))]


SHAPES = (LogitsShape,)
