"""Shapes of the choice of keys, for `precompile` and the command line."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from jax_deepgemm.core.shapes import Call, CallShape, choice, size
from jax_deepgemm.ops.indexer_topk.api import indexer_topk
from jax_deepgemm.ops.topk.api import ORDERS


@dataclass(frozen=True)
class IndexerTopkShape(CallShape):
    """The best keys of every token."""

    OPS: ClassVar = ("indexer_topk",)
    LAYER: ClassVar = True
    tokens: int = size("rows of the result")
    keys: int = size("of which some are chosen")
    k: int = size("how many of them", 2048)
    heads: int = size("of a token", 64)
    depth: int = size("numbers of a head, and of a key", 128)
    order: str = choice("of the result", *ORDERS, default="value")

    def calls(self) -> list[Call]:
        def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        q = array(self.tokens, self.heads, self.depth, dtype="float8_e4m3fn")
        kv = array(self.keys, self.depth, dtype="float8_e4m3fn"), array(self.keys)
        weights, bound = array(self.tokens, self.heads), array(self.tokens, dtype="int32")
        run: Any = functools.partial(indexer_topk, k=self.k, order=self.order)
        return [Call("indexer_topk", run, (q, kv, weights, bound, bound))]


SHAPES = (IndexerTopkShape,)
