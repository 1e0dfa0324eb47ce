"""Rows of the benchmark: logits of an indexer, beside DeepGEMM's figures and beside the same in jnp."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.bench import BESIDE_PEER, CLOCK, RATES, Fields, Row, Table, recorded_rows
from jax_deepgemm.ops.indexer.api import bf16_mqa_logits, mqa_logits
from jax_deepgemm.ops.indexer.paged import paged_mqa_logits
from jax_deepgemm.ops.indexer.paged_op import bytes_of
from jax_deepgemm.ops.quantize import quantize
from jax_deepgemm.ops.quantize.fp4 import quantize_fp4

SHAPES = (
    (8192, 65536, 64, 128),
    (8192, 65536, 32, 128),
    (2048, 8192, 64, 128),
    (2048, 8192, 32, 128),
    (2048, 8192, 16, 128),
    (2048, 65536, 64, 128),
    (2048, 65536, 32, 128),
    (2048, 8192, 64, 64),
    (2048, 8192, 64, 32),
    (64, 65536, 64, 128),
)
"""Tokens, keys, heads, d. V3.2 and V4 have 64 heads, GLM-5 32; 2048 tokens are a chunk of a prompt."""
BF16_SHAPES = ((2048, 8192, 64, 128), (2048, 8192, 32, 128))
FP4_SHAPES = SHAPES[:4]
WINDOWS = ("all", "causal")
"""All keys, as DeepGEMM's figures are, or those up to a token, which are the last ones."""


def draw(type_: str, tokens: int, keys: int, heads: int, depth: int) -> tuple[Any, ...]:
    names = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(names[0], (tokens, heads, depth), jnp.bfloat16)
    kv = jax.random.normal(names[1], (keys, depth), jnp.bfloat16)
    weights = jax.random.normal(names[2], (tokens, heads))
    if type_ == "fp4":
        return quantize_fp4(q), quantize_fp4(kv), weights
    if type_ == "fp8":
        return q.astype(jnp.float8_e4m3fn), quantize(kv), weights
    return q, kv, weights


def window(kind: str, tokens: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """First key, and the one behind the last, of each token."""
    end = jnp.full(tokens, keys) if kind == "all" else keys - tokens + 1 + jnp.arange(tokens)
    return jnp.zeros(tokens, jnp.int32), end.astype(jnp.int32)


def _bytes(type_: str, tokens: int, keys: int, heads: int, depth: int) -> int:
    size = {"fp4": 0.5, "fp8": 1, "bf16": 2}[type_]
    operands = int((tokens * heads + keys) * depth * size) + 4 * (tokens * heads + keys)
    return operands + 4 * tokens * keys


def _rows(small: bool) -> Iterator[Row]:
    tables = {"fp8": SHAPES, "bf16": BF16_SHAPES, "fp4": FP4_SHAPES}
    shapes = [(type_, one) for type_, table in tables.items() for one in table]
    for type_, shape in [("fp8", (16, 256, 8, 32))] if small else shapes:
        tokens, keys, heads, depth = shape
        for kind in WINDOWS if (depth == 128 and type_ != "fp4") or small else WINDOWS[:1]:
            scored = tokens * keys - (tokens * (tokens - 1) // 2 if kind == "causal" else 0)
            yield Row(
                name=f"mqa logits {type_} s={tokens} n={keys} h={heads} d={depth} {kind}",
                fields={"type": type_, "s": tokens, "n": keys, "h": heads, "d": depth, "window": kind},
                function=bf16_mqa_logits if type_ == "bf16" else mqa_logits,
                draw=functools.partial(draw, type_, *shape),
                constants=window(kind, tokens, keys),
                flops=2 * scored * heads * depth,
                bytes=_bytes(type_, *shape),
            )


def _recorded(tables: Mapping[str, Any]) -> dict[tuple[Any, ...], Fields]:
    return {
        ("fp8", row["s"], row["n"], row["h"], row["d"], "all"): row
        for row in recorded_rows(tables, "mqa_logits")
    }


PAGED_SHAPES = (
    (64, 1, 8192, 64),
    (64, 2, 8192, 64),
    (64, 4, 8192, 64),
    (64, 8, 8192, 64),
    (128, 1, 32768, 64),
    (64, 1, 8192, 32),
    (64, 1, 8192, 16),
    (8, 2, 131072, 64),
)
"""Requests, tokens of each, keys of each on average, heads; d = 128, pages of 64 keys."""
PAGE, DEPTH = 64, 128


def _draw_pages(type_: str, requests: int, tokens: int, keys: int, heads: int) -> tuple[Any, ...]:
    """q, a cache in DeepSeek's format, weights."""
    names = jax.random.split(jax.random.key(0), 3)
    pages = requests * _width(keys)
    q = jax.random.normal(names[0], (requests, tokens, heads, DEPTH), jnp.bfloat16)
    if type_ == "fp4":
        values = jax.random.bits(names[1], (pages, PAGE, DEPTH // 2), jnp.uint8)
        scales = jnp.full((pages, PAGE), 0x7F7F7F7F, jnp.int32)
    else:
        values = jax.random.normal(names[1], (pages, PAGE, DEPTH), jnp.bfloat16).astype(jnp.float8_e4m3fn)
        scales = jnp.ones((pages, PAGE))
    cache = bytes_of(values, scales).reshape(pages, PAGE, -1)
    return q.astype(jnp.float8_e4m3fn), cache, jax.random.normal(names[2], (requests, tokens, heads))


def _width(keys: int) -> int:
    """Pages of a request's table."""
    return 2 * keys // PAGE


def _contexts(requests: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Contexts of 0.7 to 1.3 times `keys`, and tables of pages in any order."""
    rng = np.random.default_rng(0)
    lens = rng.integers(7 * keys // 10, 13 * keys // 10, requests, np.int32)
    tables = rng.permutation(requests * _width(keys)).reshape(requests, -1)
    return lens, tables.astype(np.int32)


def _paged_rows(small: bool) -> Iterator[Row]:
    shapes = ((2, 1, 256, 16),) if small else PAGED_SHAPES
    typed = [("fp8", shape) for shape in shapes] + [("fp4", shape) for shape in shapes[:5]]
    for type_, (requests, tokens, keys, heads) in typed:
        scored = requests * keys
        yield Row(
            name=f"paged mqa logits {type_} b={requests} next_n={tokens} n={keys} h={heads}",
            fields={"type": type_, "b": requests, "next_n": tokens, "n": keys, "h": heads},
            function=functools.partial(paged_mqa_logits, max_context_len=2 * keys),
            draw=functools.partial(_draw_pages, type_, requests, tokens, keys, heads),
            constants=_contexts(requests, keys),
            flops=2 * scored * tokens * heads * DEPTH,
            bytes=scored * ((DEPTH if type_ == "fp8" else DEPTH // 2) + 4 + 4 * tokens),
        )
    if not small:
        yield _tokens_row()


def _tokens_row() -> Row:
    """Requests of 1 to 4 tokens each, as speculative decoding has them."""
    requests, keys, heads = 64, 8192, 64
    counts = np.random.default_rng(1).integers(1, 5, requests)
    lens, tables = _contexts(requests, keys)
    whose = np.repeat(np.arange(requests, dtype=np.int32), counts)
    return Row(
        name=f"paged mqa logits fp8 b={requests} next_n=1-4 n={keys} h={heads}",
        fields={"type": "fp8", "b": requests, "next_n": "1-4", "n": keys, "h": heads},
        function=functools.partial(_of_tokens, max_context_len=2 * keys),
        draw=functools.partial(_draw_tokens, requests, len(whose), keys, heads),
        constants=(lens[whose], tables, whose),
        flops=2 * len(whose) * keys * heads * DEPTH,
        bytes=requests * keys * (DEPTH + 4) + 4 * len(whose) * keys,
    )


def _draw_tokens(requests: int, tokens: int, keys: int, heads: int) -> tuple[Any, ...]:
    q, cache, weights = _draw_pages("fp8", requests, -(-tokens // requests), keys, heads)
    q, weights = (x.reshape(-1, 1, *x.shape[2:])[:tokens] for x in (q, weights))
    return q, cache, weights


def _of_tokens(
    q: Any, cache: Any, weights: Any, lens: Any, tables: Any, whose: Any, **options: Any
) -> jax.Array:
    return paged_mqa_logits(q, cache, weights, lens, tables, indices=whose, **options)


def _recorded_pages(tables: Mapping[str, Any]) -> dict[tuple[Any, ...], Fields]:
    """DeepGEMM's, all of 64 heads."""
    rows = recorded_rows(tables, "paged_mqa_logits")
    return {("fp8", row["b"], row["next_n"], row["n"], 64): row for row in rows}


TABLES = {
    "mqa_logits": Table(
        "Logits of an indexer: FP8 keys with a scale of each, beside DeepGEMM; FP4, BF16; float32 logits",
        ("type", "s", "n", "h", "d", "window"),
        _rows,
        columns=(*RATES, *BESIDE_PEER, CLOCK),
        peer="DeepGEMM",
        recorded=_recorded,
        order=2,
        tuned=True,
    ),
    "paged_mqa_logits": Table(
        "Logits of keys in pages of 64, FP8 or FP4; contexts of 0.7 to 1.3 times n, 2 n columns; d = 128",
        ("type", "b", "next_n", "n", "h"),
        _paged_rows,
        columns=(*RATES, *BESIDE_PEER, CLOCK),
        peer="DeepGEMM",
        recorded=_recorded_pages,
        order=2,
        tuned=True,
    ),
}
