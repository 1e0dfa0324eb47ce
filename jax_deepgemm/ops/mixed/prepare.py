"""Operands as the mixed-input kernels read them: as those of ops/grouped/prepare.py, with the slabs as they
are. Rows of A are padded to whole 16 bytes; the kernels read its scales by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jax_deepgemm.ops.gemm.padding import ROW_BYTES, pad_axis
from jax_deepgemm.ops.grouped.prepare import fold_m_grouped, fold_masked

Arrays = Sequence[jax.Array]


def _rows(op: str, rows: Arrays) -> Arrays:
    """A, and its scales if it has some."""
    a, *scales = rows
    return pad_axis(f"{op}: a", a, -1, ROW_BYTES // a.dtype.itemsize), *scales


def _matrices(slabs: jax.Array) -> jax.Array:
    """[.., g, n / 64, bytes of a row of slabs]: of the rank that other weights have."""
    return slabs.reshape(*slabs.shape[:-2], slabs.shape[-2] * slabs.shape[-1])


def _slabs(matrices: jax.Array, like: jax.Array) -> jax.Array:
    return matrices.reshape(*matrices.shape[:-1], *like.shape[-2:])


def mixed(*arrays: jax.Array, **_: Any) -> Arrays:
    *rows, slabs = arrays
    return *_rows("mixed", rows), slabs


def m_grouped_mixed(*arrays: jax.Array, rows_format: str, **_: Any) -> Arrays:
    *rows, slabs, group_sizes, group_offset = arrays
    rows, (weights,), group_sizes, group_offset = fold_m_grouped(
        rows, (_matrices(slabs),), group_sizes, group_offset, rows_format
    )
    return *_rows("m_grouped_mixed", rows), _slabs(weights, slabs), group_sizes, group_offset


def m_masked_mixed(*arrays: jax.Array, **_: Any) -> Arrays:
    *rows, slabs, counts = arrays
    rows, (weights,), counts = fold_masked(rows, (_matrices(slabs),), counts)
    return *_rows("m_masked_mixed", rows), _slabs(weights, slabs), counts
