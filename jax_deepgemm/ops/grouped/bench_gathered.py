"""Rows of grouped products whose rows an index names, as a router draws it, each beside the same in two
steps: the rows copied to where their groups lie (`jax_deepgemm.ops.rows`), and the product of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, RATES, Beside, Row, Table
from jax_deepgemm.ops.grouped import api, gathered
from jax_deepgemm.ops.quantize.api import quantize
from jax_deepgemm.ops.rows.api import move_rows, take_quantized

SIZES = (
    (256, 4096, 8, 4096, 7168),  # DeepSeek-V3's gate and up, all experts ..
    (32, 4096, 8, 4096, 7168),  # .. and as many rows for an eighth of them
    (32, 512, 8, 4096, 7168),
    (128, 4096, 8, 3072, 4096),  # Qwen3
    (32, 4096, 4, 5760, 2880),  # gpt-oss
)
"""Groups, tokens, groups that each token goes to, n, k."""
GRADIENTS = ((32, 4096, 8, 4096, 7168), (128, 4096, 8, 3072, 4096))
"""The same, of the weight gradient [groups, n, k]."""
SMALL = ((4, 24, 2, 128, 256),)
KEYS = ("type", "product", "groups", "tokens", "top_k", "n", "k")
Index = np.ndarray[Any, np.dtype[np.int32]]
FORWARD: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "fp8": (gathered.m_grouped_fp8_gemm_nt_gathered, api.m_grouped_fp8_gemm_nt_contiguous, take_quantized),
    "bf16": (gathered.m_grouped_bf16_gemm_nt_gathered, api.m_grouped_bf16_gemm_nt_contiguous, move_rows),
}
"""With an index, without one, and what takes the rows."""


@functools.cache
def routed(groups: int, tokens: int, top_k: int) -> tuple[Index, Index]:
    """Which token each row of the product is, and the rows of each group; always the same.

    >>> rows, sizes = routed(4, 24, 2)
    >>> rows.shape, int(sizes.sum()), bool((np.bincount(rows) == 2).all())
    ((48,), 48, True)
    """
    scores = np.random.default_rng(0).random((tokens, groups))
    chosen = np.argsort(scores, axis=1)[:, :top_k].reshape(-1)
    rows = np.argsort(chosen, kind="stable") // top_k
    return rows.astype(np.int32), np.bincount(chosen, minlength=groups).astype(np.int32)


@functools.partial(jax.jit, static_argnums=range(3))
def _draw(kind: str, rows: tuple[int, ...], weights: tuple[int, ...]) -> tuple[Any, Any]:
    a, b = (
        jax.random.normal(jax.random.key(seed), x, jnp.bfloat16) for seed, x in enumerate((rows, weights))
    )
    return (quantize(a), quantize(b, block=(128, 128))) if kind == "fp8" else (a, b)


def _in_two_steps(kind: str, a: Any, b: Any, rows: jax.Array, sizes: jax.Array) -> jax.Array:
    _, product, take = FORWARD[kind]
    found: jax.Array = product(take(a, rows), b, sizes)
    return found


def _gradient(dy: jax.Array, x: jax.Array, rows: jax.Array, sizes: jax.Array) -> jax.Array:
    return gathered.k_grouped_bf16_gemm_tn_gathered(dy, x, sizes, b_rows=rows, out_dtype=jnp.bfloat16)


def _gradient_in_two_steps(dy: jax.Array, x: jax.Array, rows: jax.Array, sizes: jax.Array) -> jax.Array:
    taken = move_rows(x, rows)
    return api.k_grouped_bf16_gemm_tn_contiguous(dy, taken, sizes, out_dtype=jnp.bfloat16)


def _row(
    kind: str, product: str, shape: tuple[int, ...], functions: tuple[Any, Any], draw: Any, moved: int
) -> Row:
    groups, tokens, top_k, n, k = shape
    index, sizes = routed(groups, tokens, top_k)
    fields = dict(zip(KEYS, (kind, product, *shape), strict=True))
    constants = index, sizes
    return Row(
        name=f"gathered {kind} {product} {' '.join(f'{x}={fields[x]}' for x in KEYS[2:])}",
        fields=fields,
        function=functions[0],
        draw=draw,
        flops=2 * tokens * top_k * n * k,
        bytes=moved,
        constants=constants,
        baseline=Beside("take + product", functions[1], constants=constants, ours=True),
    )


def _rows(small: bool) -> Iterator[Row]:
    for shape in SMALL if small else SIZES:
        groups, tokens, top_k, n, k = shape
        for kind, (function, *_) in FORWARD.items():
            size = 1 if kind == "fp8" else 2
            both = function, functools.partial(_in_two_steps, kind)
            draw = functools.partial(_draw, kind, (tokens, k), (groups, n, k))
            moved = size * (tokens * k + groups * n * k) + 2 * tokens * top_k * n
            yield _row(kind, "D", shape, both, draw, moved)
    for shape in SMALL if small else GRADIENTS:
        groups, tokens, top_k, n, k = shape
        draw = functools.partial(_draw, "bf16", (tokens * top_k, n), (tokens, k))
        moved = 2 * (tokens * (top_k * n + k) + groups * n * k)
        yield _row("bf16", "dB", shape, (_gradient, _gradient_in_two_steps), draw, moved)


TABLE = Table(
    "Grouped products whose rows an index names, tokens for top_k groups each (dB: the weight gradient),"
    " beside a copy of the rows and the product",
    KEYS,
    _rows,
    columns=(*RATES, *BESIDE_BASELINE, CLOCK),
    baseline="take + product",
    part=lambda fields: f"{fields['type']} {fields['product']}",
    tuned=True,
)
