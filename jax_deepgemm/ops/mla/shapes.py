"""Shapes of latent attention, for `precompile` and the command line."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from jax_deepgemm.core.shapes import Call, CallShape, size
from jax_deepgemm.ops.mla.api import paged_mla_attention, sparse_mla_attention


@dataclass(frozen=True)
class _MlaShape(CallShape):
    """What both have: heads of 512 and 64 numbers."""

    tokens: int = size("rows of q")
    heads: int = size("of a token", 128)
    pages: int = size("of the cache", 1024)
    page_size: int = size("keys of a page", 64)

    def _arrays(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        q = jax.ShapeDtypeStruct((self.tokens, self.heads, 576), "bfloat16")
        return q, jax.ShapeDtypeStruct((self.pages, self.page_size, 576), "bfloat16")


def _integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, "int32")


@dataclass(frozen=True)
class PagedMlaShape(_MlaShape):
    """Sequences with keys in pages."""

    OPS: ClassVar = ("paged_mla_attention",)
    seqs: int = size("sequences", 1)
    table_pages: int = size("pages of a sequence at most", 128)
    max_q_len: int = size("rows of a sequence at most", 1)

    def calls(self) -> list[Call]:
        run: Any = functools.partial(paged_mla_attention, scale=192**-0.5, max_q_len=self.max_q_len)
        tables = _integers(self.seqs, self.table_pages)
        operands = (*self._arrays(), tables, _integers(self.seqs + 1), _integers(self.seqs))
        return [Call("paged_mla_attention", run, operands)]


@dataclass(frozen=True)
class SparseMlaShape(_MlaShape):
    """Tokens that name their keys."""

    OPS: ClassVar = ("sparse_mla_attention",)
    keys: int = size("that a token names", 2048)

    def calls(self) -> list[Call]:
        run: Any = functools.partial(sparse_mla_attention, scale=192**-0.5)
        return [Call("sparse_mla_attention", run, (*self._arrays(), _integers(self.tokens, self.keys)))]


SHAPES = (PagedMlaShape, SparseMlaShape)
