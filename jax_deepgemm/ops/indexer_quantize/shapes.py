"""Shapes of an indexer's rows in FP8, for `precompile` and the command line."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from jax_deepgemm.core.shapes import Call, CallShape, choice, flag, size
from jax_deepgemm.ops.indexer_quantize.api import FORMATS, indexer_quantize
from jax_deepgemm.ops.indexer_quantize.problem import DEPTHS, DTYPES


@dataclass(frozen=True)
class RotateShape(CallShape):
    """Queries, or keys that go into pages."""

    OPS: ClassVar = ("indexer_quantize",)
    LAYER: ClassVar = True
    tokens: int = size("rows of x, of which each has so many heads")
    heads: int = size("of a token; keys have one", 1)
    depth: str = choice("numbers of a head", *map(str, DEPTHS), default="128")
    dtype: str = choice("of x", *DTYPES, default="bfloat16")
    rotate: bool = flag("multiplied by a Hadamard matrix before", default=True)
    scales: str = choice("of the result", *FORMATS, default="f32")
    page: int = size("keys of a page, if they go into pages in bytes; 1: they do not", 1)

    def calls(self) -> list[Call]:
        depth = int(self.depth)
        x = jax.ShapeDtypeStruct((self.tokens, self.heads, depth), self.dtype)
        run: Any = functools.partial(indexer_quantize, rotate=self.rotate, scale_format=self.scales)
        if self.page == 1:
            return [Call("rows", run, (x,))]
        keys = jax.ShapeDtypeStruct((self.tokens, depth), self.dtype)
        slots = jax.ShapeDtypeStruct((self.tokens,), "int32")
        cache = jax.ShapeDtypeStruct((-(-self.tokens // self.page), self.page, depth + 4), "uint8")

        def write(keys: jax.Array, slots: jax.Array, cache: jax.Array) -> Any:
            return run(keys, slots=slots, cache=cache)

        return [Call("keys into pages", write, (keys, slots, cache), carry=2)]


SHAPES = (RotateShape,)
