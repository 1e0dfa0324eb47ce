"""Rows of the benchmark: norms by this package's kernel and by XLA, each beside a copy of the same bytes.

A norm reads a row and writes one, so nothing is faster than a copy. "sum": x + residual is normalised and
returned, two rows read and two written; "FP8": the norm is quantised, one scale for 128 numbers, for an FP8
product. XLA's form of it is `norm` in jnp, and `quantize`, which is a kernel of this package. `norm` runs the
kernel where XLA takes much more time than the copy: for "sum" and "FP8".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, Beside, Row, Table
from jax_deepgemm.ops.norm import norm_rows, reference
from jax_deepgemm.ops.quantize import quantize

TOKENS = (16, 4096)
HIDDEN = (4096, 7168, 8192)
BY = ("kernel", "XLA")
WHAT = {"layer": ("norm", "sum"), "rms": ("norm", "sum", "FP8", "sum, FP8")}


def _draw(tokens: int, hidden: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    x, residual = (jax.random.normal(key, (tokens, hidden), jnp.bfloat16) for key in keys[:2])
    return x, residual, jax.random.normal(keys[2], (hidden,), jnp.bfloat16)


@functools.cache
def _drawing(tokens: int, hidden: int) -> Callable[[], Any]:
    """One for all rows of equal operands, which are measured together."""
    return functools.partial(_draw, tokens, hidden)


def _by_kernel(kind: str, what: str, x: jax.Array, residual: jax.Array, gamma: jax.Array) -> Any:
    form: dict[str, Any] = {"scales": "f32", "normed": False} if what.endswith("FP8") else {}
    summed = what.startswith("sum")
    vectors = None, gamma, None
    return norm_rows(x, residual if summed else None, vectors, kind=kind, eps=1e-5, summed=summed, **form)


def _by_xla(kind: str, what: str, x: jax.Array, residual: jax.Array, gamma: jax.Array) -> Any:
    summed = what.startswith("sum")
    s = reference.total(x, residual if summed else None)
    y = reference.normed(s, gamma, kind=kind, eps=1e-5)
    found: list[jax.Array] = [y]
    if what.endswith("FP8"):
        quantized = quantize(y, (1, 128))
        found = [quantized.values, quantized.scales]
    return [*found, s] if summed else found


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
            for kind, what, by in _forms():
                size = _bytes(tokens, hidden, what)
                run = _by_kernel if by == "kernel" else _by_xla
                yield Row(
                    name=f"norm {kind} {what} by {by}: tokens={tokens} hidden={hidden}",
                    fields={"norm": kind, "what": what, "by": by, "tokens": tokens, "hidden": hidden},
                    function=functools.partial(run, kind, what),
                    draw=_drawing(tokens, hidden),
                    bytes=size,
                    prefix="",
                    baseline=Beside("a copy", _copy, _copied(size)),
                )


def _forms() -> Iterator[tuple[str, str, str]]:
    for kind, whats in WHAT.items():
        for what in whats:
            for by in BY:
                yield kind, what, by


TABLES = {
    "norms": Table(
        "Norms, with the residual's sum and with FP8 quantisation, beside a copy of as many bytes",
        ("norm", "what", "by", "tokens", "hidden"),
        _rows,
        columns=("us", "GB/s", *BESIDE_BASELINE, CLOCK),
        baseline="a copy",
        part=lambda fields: "",
        order=2,
    )
}
