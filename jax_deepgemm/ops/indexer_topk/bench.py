"""Rows of the benchmark: the choice of keys in one op, beside logits and topk in two."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, Beside, Row, Table
from jax_deepgemm.ops.indexer.api import mqa_logits
from jax_deepgemm.ops.indexer.bench import WINDOWS, draw, window
from jax_deepgemm.ops.indexer_topk.api import indexer_topk
from jax_deepgemm.ops.topk.api import topk

SHAPES = ((8192, 65536, 64, 128, 2048), (8192, 65536, 32, 128, 2048), (2048, 16384, 64, 128, 512))
"""Tokens, keys, heads, d, k."""


def _two_calls(q: Any, kv: Any, weights: Any, start: Any, end: Any, *, k: int) -> jax.Array:
    logits = mqa_logits(q, kv, weights, start, end)
    chosen: jax.Array = topk(logits, k, start=start, end=end)
    return chosen


def _rows(small: bool) -> Iterator[Row]:
    for tokens, keys, heads, depth, k in ((16, 256, 8, 32, 40),) if small else SHAPES:
        for kind in WINDOWS:
            scored = tokens * keys - (tokens * (tokens - 1) // 2 if kind == "causal" else 0)
            bounds = window(kind, tokens, keys)
            yield Row(
                name=f"indexer topk s={tokens} n={keys} h={heads} d={depth} k={k} {kind}",
                fields={"s": tokens, "n": keys, "h": heads, "d": depth, "k": k, "window": kind},
                function=functools.partial(indexer_topk, k=k),
                draw=functools.partial(draw, "fp8", tokens, keys, heads, depth),
                constants=bounds,
                flops=2 * scored * heads * depth,
                bytes=(tokens * heads + keys) * (depth + 4) + 4 * tokens * k,
                baseline=Beside(
                    "topk(mqa_logits)", functools.partial(_two_calls, k=k), constants=bounds, ours=True
                ),
            )


TABLES = {
    "indexer_topk": Table(
        "The k best of n keys for each of s tokens in one op, beside logits and topk in two; FP8",
        ("s", "n", "h", "d", "k", "window"),
        _rows,
        columns=("us", "TFLOP/s", *BESIDE_BASELINE, CLOCK),
        baseline="two calls",
        part=lambda fields: "",
        order=2,
    )
}
