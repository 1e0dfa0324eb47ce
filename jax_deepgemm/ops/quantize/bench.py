"""Rows of the benchmark: quantising kernels, each beside a copy of as many bytes in the same process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, Beside, Row, Table
from jax_deepgemm.ops.quantize.api import quantize
from jax_deepgemm.ops.quantize.fused import quantize_both, quantize_weight

SHAPES = ((32768, 7168), (32768, 4096))
SMALL = ((256, 512),)
COPY_COLUMNS = 1 << 11

Kinds = dict[str, tuple[int, Callable[..., Any]]]
KINDS: Kinds = {
    "quantize_1x128": (2 + 1, lambda x: quantize(x, (1, 128))),
    "quantize_128x128": (2 + 1, lambda x: quantize(x, (128, 128))),
    "quantize_128x1": (2 + 1, lambda x: quantize(x, (128, 1))),
    "quantize_both": (2 + 2, quantize_both),
    "quantize_weight": (2 + 2, quantize_weight),
}
"""What is read and written of each element of [m, n], in bytes; scales, a 64th of it, do not count."""


def memory_rows(kinds: Kinds, draw: Callable[[str, int, int], Any], small: bool) -> Iterator[Row]:
    """Rows of kernels that memory bounds; those of one shape in one session, other families' too.

    Args:
      kinds: name -> bytes of an element, function.
      draw: (name, m, n) -> operands.
    """
    for m, n in SMALL if small else SHAPES:
        for kind, (size, function) in kinds.items():
            moved = size * m * n
            yield Row(
                name=f"quantize {kind} m={m} n={n}",
                fields={"kind": kind, "m": m, "n": n, "k": 0},
                function=function,
                draw=functools.partial(draw, kind, m, n),
                bytes=moved,
                session=(m, n),
                baseline=Beside(
                    "copy of as many bytes, XLA", _copy, functools.partial(_copy_operands, moved)
                ),
            )


def _copy_operands(moved: int, drawn: Any) -> tuple[jax.Array]:
    """Half of the bytes that are moved."""
    return (jnp.zeros((-(-moved // (8 * COPY_COLUMNS)), COPY_COLUMNS), jnp.uint32),)


def _copy(x: jax.Array) -> jax.Array:
    """Reads and writes every element; a plain copy could become no kernel at all."""
    return x + 1


def _draw(kind: str, m: int, n: int) -> tuple[jax.Array]:
    """x, standard normal in bfloat16."""
    return (jax.random.normal(jax.random.split(jax.random.key(0), 3)[0], (m, n), jnp.bfloat16),)


def _rows(small: bool) -> Iterator[Row]:
    kinds = {"quantize_both": KINDS["quantize_both"]} if small else KINDS
    return memory_rows(kinds, _draw, small)


QUANTISING = Table(
    "Quantising kernels of [m, n] bfloat16, beside a copy of as many bytes",
    ("kind", "m", "n"),
    _rows,
    columns=("us", "GB/s", *BESIDE_BASELINE, CLOCK),
    baseline="copy",
    part=lambda fields: str(fields["kind"]),
    order=1,
)
TABLES = {"quantize": QUANTISING}
