"""Shapes of attention to keys in pages, for `precompile`, `tune` and the command line."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from jax_deepgemm.core.shapes import Call, CallShape, choice, flag, size
from jax_deepgemm.ops.attention.api import ragged_paged_attention
from jax_deepgemm.ops.paged_append.cache import PAGE_SIZES, PagedKVCache

STORED = ("bfloat16", "float16", "float8_e4m3fn")


@dataclass(frozen=True)
class AttentionShape(CallShape):
    """Attention of new tokens of sequences to their keys in pages."""

    OPS: ClassVar = ("ragged_paged_attention",)
    tokens: int = size("of all sequences, new")
    sequences: int = size("rows of the table")
    keys: int = size("of a sequence at most: those of a row of the table")
    heads: int = size("of queries")
    kv_heads: int = size("of keys and values")
    depth: int = size("numbers of a head", 128)
    v_depth: int = size("numbers of a head of values; 0: as of keys", 0)
    stored: str = choice("of the cache", *STORED, default="bfloat16")
    page: str = choice("keys of a page", *map(str, PAGE_SIZES), default="64")
    most: int = size("tokens of a sequence, promised; 0: any", 0)
    window: int = size("keys that a token sees; 0: all", 0)
    full: bool = flag("tokens see later keys, too", default=False)

    def calls(self) -> list[Call]:
        def given(*shape: int, dtype: Any = "int32") -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        columns = -(-self.keys // int(self.page))
        create = functools.partial(
            PagedKVCache.create,
            max(1, self.sequences * columns),
            int(self.page),
            self.kv_heads,
            self.depth,
            self.stored,
            v_head_dim=self.v_depth or None,
        )
        dtype = "float16" if self.stored == "float16" else "bfloat16"
        function = functools.partial(
            ragged_paged_attention,
            causal=not self.full,
            window=self.window or None,
            max_q_len=self.most or None,
        )
        q = given(self.tokens, self.heads, self.depth, dtype=dtype)
        batch = given(self.sequences, columns), given(self.sequences + 1), given(self.sequences)
        return [Call("attention", function, (q, jax.eval_shape(create), *batch))]


SHAPES = (AttentionShape,)
