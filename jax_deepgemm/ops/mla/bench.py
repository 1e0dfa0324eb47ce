"""Rows of the benchmark: latent attention of decoding, to keys in pages and to keys that tokens name."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.bench import CLOCK, Row, Table
from jax_deepgemm.ops.mla.api import paged_mla_attention, sparse_mla_attention

PAGE, DEPTH, V_DEPTH, SCALE = 64, 576, 512, 192**-0.5
PAGED = ((128, 8192, 16, 1), (32, 4096, 16, 1), (1, 131072, 16, 1), (128, 8192, 128, 1), (64, 4096, 128, 2))
"""Sequences, keys of each, heads, tokens of each."""
SPARSE = ((128, 8192, 16, 2048), (128, 8192, 128, 2048), (2048, 1024, 128, 2048))
"""Tokens, keys of the cache for each, heads, keys that each names."""


def _arrays(seqs: int, keys: int, heads: int, tokens: int) -> tuple[jax.Array, jax.Array]:
    key = jax.random.key(0)
    cache = jax.random.normal(key, (seqs * keys // PAGE, PAGE, DEPTH), jnp.bfloat16)
    return jax.random.normal(key, (seqs * tokens, heads, DEPTH), jnp.bfloat16), cache


def _flops(tokens: int, heads: int, keys: int) -> int:
    return 2 * tokens * heads * keys * (DEPTH + V_DEPTH)


def _moved(tokens: int, heads: int, keys: int) -> int:
    """Bytes of keys, queries and results."""
    return 2 * keys * DEPTH + 2 * tokens * heads * (DEPTH + V_DEPTH)


def _paged(small: bool) -> Iterator[Row]:
    for seqs, keys, heads, tokens in ((3, 128, 4, 2),) if small else PAGED:
        rng, each = np.random.default_rng(0), keys // PAGE
        tables = rng.permutation(seqs * each).reshape(seqs, each)
        constants: tuple[Any, ...] = (tables, np.arange(seqs + 1) * tokens, np.full(seqs, keys))
        yield Row(
            name=f"mla b={seqs} n={keys} h={heads} q={tokens}",
            fields={"b": seqs, "n": keys, "h": heads, "q": tokens, "keys": "paged"},
            function=functools.partial(paged_mla_attention, scale=SCALE, max_q_len=tokens),
            draw=functools.partial(_arrays, seqs, keys, heads, tokens),
            constants=tuple(jnp.asarray(x, jnp.int32) for x in constants),
            flops=_flops(seqs * tokens, heads, keys),
            bytes=_moved(seqs * tokens, heads, seqs * keys),
        )


def _sparse(small: bool) -> Iterator[Row]:
    for tokens, keys, heads, named in ((3, 128, 4, 16),) if small else SPARSE:
        indices = np.random.default_rng(0).integers(0, tokens * keys, (tokens, named))
        yield Row(
            name=f"sparse mla b={tokens} n={named} h={heads}",
            fields={"b": tokens, "n": named, "h": heads, "q": 1, "keys": "named"},
            function=functools.partial(sparse_mla_attention, scale=SCALE),
            draw=functools.partial(_arrays, tokens, keys, heads, 1),
            constants=(jnp.asarray(indices, jnp.int32),),
            flops=_flops(tokens, heads, named),
            bytes=_moved(tokens, heads, tokens * named),
        )


def _rows(small: bool) -> Iterator[Row]:
    yield from _paged(small)
    yield from _sparse(small)


TABLES = {
    "mla": Table(
        "Latent attention (576 / 512) of b sequences' q tokens to n keys each, in pages or named; BF16",
        ("b", "n", "h", "q", "keys"),
        _rows,
        columns=("us", "TFLOP/s", "GB/s", CLOCK),
        part=lambda fields: "",
        order=3,
    )
}
