"""Shapes of logits, for `precompile`, `tune` and the command line."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np

from jax_deepgemm.core.shapes import DTYPES, RECIPES, Call, CallShape, choice, flag, size
from jax_deepgemm.ops.indexer.api import bf16_mqa_logits, mqa_logits
from jax_deepgemm.ops.indexer.paged import MOST_TOKENS, PAGES, paged_mqa_logits


@dataclass(frozen=True)
class LogitsShape(CallShape):
    """Scores of keys for tokens."""

    OPS: ClassVar = ("mqa_logits",)
    tokens: int = size("rows of the logits")
    keys: int = size("columns of the logits")
    heads: int = size("of a token", 64)
    depth: int = size("numbers of a head, and of a key", 128)
    recipe: str = choice("types of the operands; fp4: of the keys", *RECIPES, "fp4", default="fp8")
    out: str = choice("of the logits", *DTYPES, default="float32")
    compressed: bool = flag("rows begin with the first key of their window")

    def __post_init__(self) -> None:
        self.calls()

    def calls(self) -> list[Call]:
        def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        kind = "bfloat16" if self.recipe == "bf16" else "float8_e4m3fn"
        q, kv = (
            array(self.tokens, self.heads, self.depth, dtype=kind),
            array(self.keys, self.depth, dtype=kind),
        )
        scales = array(self.keys)
        if self.recipe == "fp4":
            kv, scales = array(self.keys, self.depth // 2, dtype="uint8"), array(self.keys, dtype="int32")
        weights = array(self.tokens, self.heads)
        window = np.zeros(self.tokens, np.int32), np.full(self.tokens, self.keys, np.int32)
        options: dict[str, Any] = {"compressed": self.compressed, "out_dtype": self.out}
        if self.recipe == "bf16":
            function = functools.partial(bf16_mqa_logits, **options)
            return [Call("logits", function, (q, kv, weights, *window))]
        quantised = functools.partial(mqa_logits, **options)
        return [Call("logits", quantised, (q, (kv, scales), weights, *window))]


@dataclass(frozen=True)
class PagedShape(CallShape):
    """Scores of keys in pages for the last tokens of requests."""

    OPS: ClassVar = ("paged_mqa_logits",)
    requests: int = size("of which each has a row of the table")
    pages: int = size("of a request: columns of the table")
    next_n: int = size("tokens of a request", 1, MOST_TOKENS)
    heads: int = size("of a token", 64)
    depth: int = size("numbers of a head, and of a key", 128)
    page: str = choice("keys of a page", *map(str, PAGES), default="64")
    joined: bool = flag("a page is its values and then its scales, in bytes", default=True)
    keys: str = choice("types of the keys", "fp8", "fp4", default="fp8")
    out: str = choice("of the logits", *DTYPES, default="float32")

    def __post_init__(self) -> None:
        self.calls()

    def calls(self) -> list[Call]:
        def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        keys = self.requests * self.pages, int(self.page)
        tokens = self.requests, self.next_n, self.heads
        values, scales = (self.depth, "float8_e4m3fn"), "float32"
        if self.keys == "fp4":
            values, scales = (self.depth // 2, "uint8"), "int32"
        cache: Any = array(*keys, values[0], dtype=values[1]), array(*keys, dtype=scales)
        if self.joined:
            cache = array(*keys, values[0] + 4, dtype="uint8")
        operands = (
            array(*tokens, self.depth, dtype="float8_e4m3fn"),
            cache,
            array(*tokens),
            np.full(self.requests, self.pages * keys[1], np.int32),
            np.arange(keys[0], dtype=np.int32).reshape(self.requests, self.pages),
        )
        return [Call("logits", functools.partial(paged_mqa_logits, out_dtype=self.out), operands)]


SHAPES = (LogitsShape, PagedShape)
