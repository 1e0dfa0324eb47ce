"""Calls for compute-sanitizer: every kind of quantising kernel; each writes all results, one is compared."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.ops.quantize.api import quantize
from jax_deepgemm.ops.quantize.blocks import row_blocks
from jax_deepgemm.ops.quantize.fused import quantize_both, quantize_weight
from jax_deepgemm.ops.quantize.groups import quantize_groups, quantize_rows
from jax_deepgemm.ops.quantize.op import KERNEL_BLOCKS

M, N = 520, 272  # tails in both dimensions
ROWS = 300  # that are valid, where a kernel is told
SIZES = (130, 0, 7, 260)  # of groups, seven blocks, and behind them rows of none
USED = 7 * 128  # columns of the transposed copy that are defined
BLOCKS_T = ((128, 1), (128, 128))  # of the transposed copy's scales


def cases() -> Iterator[Case]:
    """Yields every block of scales, and the kernels with two results."""
    rng, rows = np.random.default_rng(0), jnp.int32(ROWS)
    for shape in ((M, N), (M + 1, N + 3)):
        x = jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for block in KERNEL_BLOCKS:
            yield Case(f"quantize {block} {x.shape}", functools.partial(_values, block), (x,))
        for block_t in BLOCKS_T:
            both = functools.partial(_both, block_t, rows)
            yield Case(f"quantize_both {block_t} {x.shape}", both, (x,))
        yield Case(f"quantize_weight {x.shape}", lambda x: quantize_weight(x)[2], (x,))
        yield from _groups(x)


def _groups(x: jax.Array) -> Iterator[Case]:
    """Rows as they lie, and taken by an index that points outside of x here and there."""
    blocks = row_blocks(jnp.asarray(SIZES), x.shape[0])
    index = jnp.asarray(np.random.default_rng(1).integers(-9, x.shape[0] + 9, x.shape[0]), jnp.int32)
    for name, dtype in (("", x.dtype), (" float32", jnp.float32)):
        wide = x.astype(dtype)
        for block_t in BLOCKS_T:
            groups = functools.partial(_of_groups, block_t, blocks)
            yield Case(f"quantize_groups {block_t}{name} {x.shape}", groups, (wide,))
        yield Case(
            f"quantize_groups by index{name} {x.shape}",
            lambda x, index: quantize_groups(x, blocks, index)[2][:, :USED],
            (wide, index),
        )
    yield Case(f"quantize_rows {x.shape}", lambda x, index: quantize_rows(x, index).values, (x, index))
    copies, wanted = (
        np.full(2 * x.shape[0] + 50, x.shape[0], np.int32),
        np.arange(2 * x.shape[0]).reshape(-1, 2),
    )
    copies[wanted] = np.arange(x.shape[0])[:, None]  # rows behind them are copies of none
    table = jnp.asarray(copies), jnp.asarray(wanted, jnp.int32)
    yield Case(
        f"quantize_rows once {x.shape}", lambda x, *table: quantize_rows(x, *table).values, (x, *table)
    )


def _both(block_t: tuple[int, int], rows: jax.Array, x: jax.Array) -> jax.Array:
    return quantize_both(x, rows, block_t=block_t)[2]


def _of_groups(block_t: tuple[int, int], blocks: jax.Array, x: jax.Array) -> jax.Array:
    return quantize_groups(x, blocks, block_t=block_t)[2][:, :USED]


def _values(block: tuple[int, int], x: jax.Array) -> jax.Array:
    return quantize(x, block).values
