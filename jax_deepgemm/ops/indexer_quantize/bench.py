"""Rows of the benchmark: an indexer's queries, and keys into pages, each beside the same in jnp."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, Beside, Row, Table
from jax_deepgemm.ops.indexer_quantize import reference
from jax_deepgemm.ops.indexer_quantize.api import indexer_quantize

DEPTH, PAGE = 128, 64
TOKENS = (1, 64, 8192)
HEADS = (32, 64)


def _queries(tokens: int, heads: int) -> tuple[jax.Array]:
    return (jax.random.normal(jax.random.key(0), (tokens, heads, DEPTH), jnp.bfloat16),)


def _keys(tokens: int) -> tuple[jax.Array, ...]:
    pages = -(-2 * tokens // PAGE)
    keys = jax.random.split(jax.random.key(0))
    slots = jax.random.permutation(keys[1], pages * PAGE)[:tokens].astype(jnp.int32)
    cache = jnp.zeros((pages, PAGE * (DEPTH + 4)), jnp.uint8)
    return jax.random.normal(keys[0], (tokens, DEPTH), jnp.bfloat16), slots, cache


def _write(x: jax.Array, slots: jax.Array, cache: jax.Array) -> jax.Array:
    paged = cache.reshape(-1, PAGE, DEPTH + 4)
    return indexer_quantize(x, cache=paged, slots=slots).reshape(cache.shape)


def _write_plain(x: jax.Array, slots: jax.Array, cache: jax.Array) -> jax.Array:
    return reference.to_bytes(x, slots, cache, page=PAGE, rotate=True, powers=False)[0]


def _rows(small: bool) -> Iterator[Row]:
    for tokens in TOKENS[:1] if small else TOKENS:
        for heads in HEADS[:1] if small else HEADS:
            yield Row(
                name=f"indexer_quantize tokens={tokens} heads={heads}",
                fields={"what": "queries", "tokens": tokens, "heads": heads},
                function=indexer_quantize,
                draw=functools.partial(_queries, tokens, heads),
                bytes=tokens * heads * (3 * DEPTH + 4),
                baseline=Beside("jnp, XLA", functools.partial(reference.quantize, rotate=True, powers=False)),
            )
        yield Row(
            name=f"indexer_quantize tokens={tokens} into pages",
            fields={"what": "keys into pages", "tokens": tokens, "heads": 1},
            function=_write,
            draw=functools.partial(_keys, tokens),
            carry=2,
            bytes=tokens * (3 * DEPTH + 8),
            baseline=Beside("jnp, XLA", _write_plain),
        )


TABLES = {
    "indexer_quantize": Table(
        "An indexer's rows of 128 bfloat16, rotated and in FP8, beside jnp",
        ("what", "tokens", "heads"),
        _rows,
        columns=("us", "GB/s", *BESIDE_BASELINE, CLOCK),
        baseline="jnp",
        part=lambda fields: str(fields["what"]),
        order=2,
    )
}
