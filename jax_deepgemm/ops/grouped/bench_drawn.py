"""Rows of K-grouped products whose sizes are those of a router, each beside as many rows spread evenly.

Each row of k belongs to one of the groups with equal probability, so no size is a multiple of 128. "fp8" and
"bf16" are the public ops, whose scales are those of blocks of the whole k; "fp8 layer" is the weight gradient
as `grouped_linear` and the MoE layers call it, on the operands that they make for it, whose blocks begin with
each group, and "fp8 layer 128x128" that of weight_gradient="128x128".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.bench import CLOCK, Beside, Row, Table
from jax_deepgemm.ops.grouped import recipe
from jax_deepgemm.ops.grouped.api import k_grouped_bf16_gemm_tn_contiguous, k_grouped_fp8_gemm_nt_contiguous
from jax_deepgemm.ops.grouped.bench_rows import Sizes
from jax_deepgemm.ops.grouped.bench_skew import even_sizes, half_sizes
from jax_deepgemm.ops.quantize.api import quantize

SIZES = ((32, 4096, 7168, 1024), (32, 7168, 2048, 1024), (8, 4096, 7168, 4096), (128, 1536, 4096, 512))
"""Groups, m, n, k expected in each."""
HALF = ((32, 4096, 7168, 32768), (32, 7168, 2048, 32768))
"""Groups, m, n, and k of all groups, of which one has half."""
SMALL = (3, 64, 128, 100)
KEYS = ("type", "groups", "m", "n", "k")
LAYERS = {
    "fp8 layer": recipe.LayerOptions(),
    "fp8 layer 128x128": recipe.LayerOptions(weight_gradient="128x128"),
}
Function = Callable[..., jax.Array]
FUNCTIONS: dict[str, Function] = {
    "fp8": functools.partial(k_grouped_fp8_gemm_nt_contiguous, out_dtype=jnp.bfloat16),
    "bf16": functools.partial(k_grouped_bf16_gemm_tn_contiguous, out_dtype=jnp.bfloat16),
}


def drawn_sizes(groups: int, total: int) -> Sizes:
    """Returns how many of so many rows each group gets if all are equally likely; always the same.

    >>> sizes = drawn_sizes(8, 32768)
    >>> sum(sizes), 3900 < min(sizes) < max(sizes) < 4300, any(size % 128 == 0 for size in sizes)
    (32768, True, False)
    """
    return tuple(map(int, np.random.default_rng(0).multinomial(total, [1 / groups] * groups)))


def _normal(*shapes: tuple[int, int]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


@functools.partial(jax.jit, static_argnums=range(4))
def draw(kind: str, total: int, m: int, n: int) -> tuple[Any, Any]:
    """A and B, in FP8 as [rows, k], standard normal."""
    a, b = _normal((total, m), (total, n))
    return (quantize(a.T), quantize(b.T)) if kind == "fp8" else (a, b)


@functools.partial(jax.jit, static_argnums=0)
def _layer_operands(kind: str, a: jax.Array, b: jax.Array, sizes: jax.Array) -> tuple[Any, Any]:
    """A and B as a layer quantises them for its weight gradient."""
    groups, options = recipe.Groups.of(sizes, None), LAYERS[kind]
    return recipe.both(a, groups, options, "dy")[1], recipe.both(b, groups, options, "x")[1]


def _draw_layer(kind: str, total: int, m: int, n: int, *sizes: Sizes) -> list[tuple[Any, Any]]:
    """The operands for each of these sizes."""
    a, b = jax.jit(_normal, static_argnums=(0, 1))((total, m), (total, n))
    return [_layer_operands(kind, a, b, jnp.asarray(each, jnp.int32)) for each in sizes]


def _layer(kind: str, rows: int, num_groups: int, a: Any, b: Any, sizes: jax.Array) -> jax.Array:
    """The weight gradient of a layer."""
    groups = recipe.Groups.of(sizes, None)
    return recipe.k_grouped(a, b, groups, rows, num_groups, LAYERS[kind], jnp.bfloat16)


def beside_even(
    table: str,
    fields: dict[str, Any],
    sizes: Sizes,
    function: Function,
    draw: Callable[[], Any],
    operands: tuple[Callable[[Any], Any], Callable[[Any], Any]] = (tuple, tuple),
) -> Row:
    """Returns a row of given sizes beside even ones.

    >>> fields = {"type": "bf16", "groups": 2, "m": 64, "n": 128, "k": 100}
    >>> row = beside_even("k_drawn", fields, (70, 130), FUNCTIONS["bf16"], lambda: draw("bf16", 200, 64, 128))
    >>> row.name, row.baseline.fields["group_sizes"]
    ('k_drawn bf16 groups=2 m=64 n=128 k=100', [100, 100])

    Args:
      fields: type, m and n among them.
      function: of operands and sizes, bfloat16 D.
      operands: of what `draw` returns: the row's, and those of even sizes.
    """
    even, (kind, m, n) = even_sizes(sizes), (fields[name] for name in ("type", "m", "n"))
    total, size = sum(sizes), 2 if kind.startswith("bf16") else 1
    words = " ".join(str(v) if isinstance(v, str) else f"{k}={v}" for k, v in fields.items())
    return Row(
        name=f"{table} {words}",
        fields=fields | {"group_sizes": list(sizes)},
        function=function,
        draw=draw,
        flops=2 * total * m * n,
        bytes=size * total * (m + n) + 2 * len(sizes) * m * n,
        operands=operands[0],
        constants=(np.asarray(sizes, np.int32),),
        baseline=Beside(
            "the same rows, spread evenly",
            function,
            operands[1],
            (np.asarray(even, np.int32),),
            fields={"group_sizes": list(even)},
            ours=True,
        ),
    )


def rows(small: bool) -> Iterator[Row]:
    """Sizes that a router draws: of the public ops, and of the layers."""
    for groups, m, n, k in (SMALL,) if small else SIZES:
        total, sizes = groups * k, drawn_sizes(groups, groups * k)
        fields = {"groups": groups, "m": m, "n": n, "k": k}
        for kind, function in FUNCTIONS.items():
            drawing = functools.partial(draw, kind, total, m, n)
            yield beside_even("k_drawn", {"type": kind, **fields}, sizes, function, drawing)
        own, even = (lambda drawn: drawn[0]), (lambda drawn: drawn[1])
        for kind in LAYERS:
            drawing = functools.partial(_draw_layer, kind, total, m, n, sizes, even_sizes(sizes))
            function = functools.partial(_layer, kind, total, groups)
            yield beside_even("k_drawn", {"type": kind, **fields}, sizes, function, drawing, (own, even))


def skewed(small: bool) -> Iterator[Row]:
    """Rows of the table of skewed groups: one group has half of k."""
    for groups, m, n, total in ((4, 64, 128, 600),) if small else HALF:
        sizes = half_sizes(groups, total)
        for kind, function in FUNCTIONS.items():
            fields = {"type": kind, "case": "half of k", "groups": groups, "m": m, "n": n, "k": total}
            yield beside_even("skew", fields, sizes, function, functools.partial(draw, kind, total, m, n))


TABLE = Table(
    "K-grouped with sizes as a router draws them, beside as many rows spread evenly; bfloat16 D; ratio of"
    " times, smaller is better",
    KEYS,
    rows,
    columns=("us", "TFLOP/s", "GB/s", "{baseline} us", "{baseline} TFLOP/s", "ratio", CLOCK),
    baseline="even sizes",
    part=lambda fields: str(fields["type"]),
    order=4,
)
