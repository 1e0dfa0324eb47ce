"""Rows of the benchmark: norms by XLA, beside a copy of the same bytes.

A norm reads a row and writes one, so nothing is faster than a copy. "sum": x + residual is normalised and
returned, two rows read and two written; "FP8": the norm is quantised, one scale for 128 numbers, for an FP8
product. Where XLA takes much more time than the copy, a kernel would help.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, RATES, Beside, Row, Table
from jax_deepgemm.inference.norms import norm
from jax_deepgemm.ops.quantize import quantize

TOKENS = (1, 16, 4096)
HIDDEN = (4096, 7168, 8192)
WHAT = {"layer": ("norm", "sum"), "rms": ("norm", "sum", "FP8", "sum, FP8")}


def _draw(tokens: int, hidden: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    x, residual = (jax.random.normal(key, (tokens, hidden), jnp.bfloat16) for key in keys[:2])
    return x, residual, jax.random.normal(keys[2], (hidden,), jnp.bfloat16)


@functools.cache
def _drawing(tokens: int, hidden: int) -> Callable[[], Any]:
    """One for all rows of equal operands, which are measured together."""
    return functools.partial(_draw, tokens, hidden)


def _function(kind: str, what: str) -> Callable[..., Any]:
    def run(x: jax.Array, residual: jax.Array, gamma: jax.Array) -> Any:
        total: list[jax.Array] = []
        if what.startswith("sum"):
            y, *total = norm(x, gamma, kind=kind, residual=residual, return_sum=True)
        else:
            y = norm(x, gamma, kind=kind)
        if what.endswith("FP8"):
            quantized = quantize(y, (1, 128))
            return quantized.values, quantized.scales, *total
        return y, *total

    return run


def _bytes(tokens: int, hidden: int, what: str) -> int:
    """Read and written, each once: 2 a number, or 1 and a float32 scale for 128."""
    written = hidden + 4 * hidden // 128 if what.endswith("FP8") else 2 * hidden
    rows = 2 * hidden + written + (4 * hidden if what.startswith("sum") else 0)
    return tokens * rows + 2 * hidden


def _copy(x: jax.Array) -> jax.Array:
    """Reads all, writes all: of other numbers, so that it is not left out."""
    return x + jnp.ones((), x.dtype)


def _copied(size: int) -> Callable[[Any], tuple[jax.Array]]:
    """Half of the bytes, as an operand."""
    return lambda drawn: (jnp.resize(drawn[0].reshape(-1), (max(size // 4, 1),)),)


def _rows(small: bool) -> Iterator[Row]:
    for hidden in (256,) if small else HIDDEN:
        for tokens in (3,) if small else TOKENS:
            for kind, whats in WHAT.items():
                for what in whats:
                    size = _bytes(tokens, hidden, what)
                    yield Row(
                        name=f"norm {kind} {what}: tokens={tokens} hidden={hidden}",
                        fields={"norm": kind, "what": what, "tokens": tokens, "hidden": hidden},
                        function=_function(kind, what),
                        draw=_drawing(tokens, hidden),
                        bytes=size,
                        prefix="",
                        baseline=Beside("a copy", _copy, _copied(size)),
                    )


TABLES = {
    "norms": Table(
        "Norms by XLA, with the residual's sum and with FP8 quantisation, beside a copy of as many bytes",
        ("norm", "what", "tokens", "hidden"),
        _rows,
        columns=(*RATES, *BESIDE_BASELINE, CLOCK),
        baseline="a copy",
        part=lambda fields: "",
        order=2,
    )
}
