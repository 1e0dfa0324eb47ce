"""Shapes of tokens that go to a cache, for `precompile` and the command line."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jax_deepgemm.core.shapes import Call, CallShape, choice, flag, size
from jax_deepgemm.ops.paged_append.api import paged_append
from jax_deepgemm.ops.paged_append.cache import PAGE_SIZES, PagedKVCache

DTYPES = ("bfloat16", "float16", "float32")
STORED = ("bfloat16", "float16", "float8_e4m3fn")


@dataclass(frozen=True)
class AppendShape(CallShape):
    """Keys and values of tokens, and queries where they turn, too."""

    OPS: ClassVar = ("paged_append",)
    LAYER: ClassVar = True
    tokens: int = size("of all sequences, new")
    heads: int = size("of queries, which turn as keys do")
    kv_heads: int = size("of keys and values")
    depth: int = size("numbers of a head", 128)
    dtype: str = choice("of tokens", *DTYPES, default="bfloat16")
    stored: str = choice("of the cache", *STORED, default="bfloat16")
    page: str = choice("tokens of a page", *map(str, PAGE_SIZES), default="64")
    pages: int = size("of the cache", 1024)
    rotary: bool = flag("keys and queries turn", default=True)
    interleaved: bool = flag("pairs are neighbours", default=False)

    def calls(self) -> list[Call]:
        def given(*shape: int, dtype: Any = self.dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        create = functools.partial(
            PagedKVCache.create, self.pages, int(self.page), self.kv_heads, self.depth, self.stored
        )
        cache = jax.eval_shape(create)
        new = given(self.tokens, self.kv_heads, self.depth)
        at = given(self.tokens, dtype="int32")
        if not self.rotary:
            return [Call("append", paged_append, (cache, new, new, at))]

        def turned(cache: PagedKVCache, k: Any, v: Any, slots: Any, q: Any, positions: Any, freq: Any) -> Any:
            form = {"q": q, "rotary": (positions, freq), "interleaved": self.interleaved}
            return paged_append(cache, k, v, slots, **form)

        query = given(self.tokens, self.heads, self.depth)
        freq = given(self.depth // 2, dtype=jnp.float32)
        return [Call("append, turned", turned, (cache, new, new, at, query, at, freq))]


SHAPES = (AppendShape,)
