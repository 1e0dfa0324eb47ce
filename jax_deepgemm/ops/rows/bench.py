"""Rows of the benchmark: rows that are moved by an index, as copies of tokens are, beside XLA's gather."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, Beside, Row, Table
from jax_deepgemm.ops.dispatch.api import plan_copies
from jax_deepgemm.ops.quantize import quantize, quantize_rows
from jax_deepgemm.ops.rows import reference
from jax_deepgemm.ops.rows.api import move_rows, take_quantized

SHAPES = ((16, 7168), (4096, 7168), (16384, 2048))
"""Tokens, of which each has TOP_K copies; hidden."""
TOP_K, EXPERTS = 8, 32


def _draw(kind: str, tokens: int, hidden: int) -> tuple[Any, ...]:
    """Tokens, and which of them each row is, in the order of the experts."""
    keys = jax.random.split(jax.random.key(0))
    ids = jax.random.randint(keys[0], (tokens, TOP_K), 0, EXPERTS, jnp.int32)
    x = jax.random.normal(keys[1], (tokens, hidden), jnp.bfloat16)
    return quantize(x, (1, 128)) if kind == "fp8" else x, plan_copies(ids, EXPERTS)[1] // TOP_K


def _draw_copies(tokens: int, hidden: int) -> tuple[jax.Array, ...]:
    """The same with the rows of each token."""
    ids = jax.random.randint(jax.random.split(jax.random.key(0))[0], (tokens, TOP_K), 0, EXPERTS, jnp.int32)
    x, index = _draw("bf16", tokens, hidden)
    return x, index, plan_copies(ids, EXPERTS)[2]


def _plain(x: Any, index: jax.Array) -> list[jax.Array]:
    return reference.take(*jax.tree.leaves(x), index)


def _rows(small: bool) -> Iterator[Row]:
    for tokens, hidden in ((16, 256),) if small else SHAPES:
        yield Row(
            name=f"rows copies tokens={tokens} hidden={hidden}",
            fields={"kind": "copies", "tokens": tokens, "top_k": TOP_K, "hidden": hidden},
            function=move_rows,
            draw=functools.partial(_draw_copies, tokens, hidden),
            bytes=2 * hidden * tokens * (1 + TOP_K) + 8 * tokens * TOP_K,
            baseline=Beside("XLA's gather", lambda x, index, position: _plain(x, index)),
        )
        yield Row(
            name=f"rows quantised copies tokens={tokens} hidden={hidden}",
            fields={"kind": "quantised copies", "tokens": tokens, "top_k": TOP_K, "hidden": hidden},
            function=quantize_rows,
            draw=functools.partial(_draw_copies, tokens, hidden),
            bytes=tokens * (2 * hidden + TOP_K * (hidden + 4 * -(-hidden // 128) + 8)),
            baseline=Beside("XLA's gather", lambda x, index, position: _plain(x, index)),
        )
        for kind, function in (("bf16", move_rows), ("fp8", take_quantized)):
            row_bytes = 2 * hidden if kind == "bf16" else hidden + 4 * -(-hidden // 128)
            yield Row(
                name=f"rows {kind} tokens={tokens} hidden={hidden}",
                fields={"kind": kind, "tokens": tokens, "top_k": TOP_K, "hidden": hidden},
                function=function,
                draw=functools.partial(_draw, kind, tokens, hidden),
                bytes=row_bytes * tokens * (1 + TOP_K) + 4 * tokens * TOP_K,
                baseline=Beside("XLA's gather", _plain),
            )


TABLES = {
    "rows": Table(
        "Rows of [tokens, hidden] moved to where their experts are, beside XLA's gather",
        ("kind", "tokens", "top_k", "hidden"),
        _rows,
        columns=("us", "GB/s", *BESIDE_BASELINE, CLOCK),
        baseline="gather",
        part=lambda fields: "",
        order=1,
    )
}
