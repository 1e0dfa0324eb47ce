"""Rows by their index as ops. Rows that are taken from are whole on each device; columns, and the rows that
are wanted, are cut freely."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.declaration import Dims
from jax_deepgemm.core.derivatives import Wanted, same_varying_axes
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import pieces_of_whole
from jax_deepgemm.ops.rows import reference
from jax_deepgemm.ops.rows.problem import SUMMED


def _result(*shapes: Dims, dtypes: tuple[np.dtype, ...]) -> list[tuple[Dims, Any]]:
    *given, index = shapes
    return [((*index, x[1]), dtype) for x, dtype in zip(given, dtypes, strict=True)]


def _jvp(primals: list[Any], tangents: list[Any], *, dtypes: tuple[np.dtype, ...], **options: Any) -> Any:
    index = primals[-1]
    return [
        None if tangent is None else TAKE(tangent, index, dtypes=(dtype,), **options)[0]
        for tangent, dtype in zip(tangents[:-1], dtypes, strict=True)
    ]


def _transpose(which: int, cotangents: list[jax.Array], operands: list[Any], **_: Any) -> jax.Array:
    """Rows that were taken several times sum up."""
    wanted, index = operands[which], operands[-1]
    assert isinstance(wanted, Wanted)
    zeros, rows, index = same_varying_axes([jnp.zeros(wanted.shape, wanted.dtype), cotangents[which], index])
    if not wanted.shape[0]:
        return zeros
    return zeros.at[index].add(rows, mode="drop", wrap_negative_indices=False)


def _op(name: str, rule: str, kernel: str) -> Op:
    return Op(
        name,
        rule,
        _result,
        reference.take,
        kernel=LazyKernel("jax_deepgemm.ops.rows.kernel", kernel),
        jvp=_jvp,
        transpose=_transpose,
    )


TAKE = _op("take_rows", "t h, m -> m h", "take")
TAKE_SCALED = _op("take_rows_scaled", "t h, t b, m -> m h, m b", "take_scaled")


def _copies_jvp(primals: list[Any], tangents: list[Any], *, dtype: np.dtype, **options: Any) -> Any:
    return COPIES(tangents[0], *primals[1:], dtype=dtype, **options)


def _copies_transpose(
    which: int, cotangents: list[jax.Array], operands: list[Any], *, dtype: np.dtype, **options: Any
) -> jax.Array:
    """The copies of each row sum up: position says which they are."""
    (rows,), (*_, position) = cotangents, operands
    if dtype.name in SUMMED:
        return SUMS(*same_varying_axes([rows, position]), dtype=dtype, **options)[0]
    return reference.sums(rows, position)[0]


COPIES = Op(
    "copy_rows",
    "t h, m, t s -> r h",
    lambda x, index, position, *, dtype: [((index[0], x[1]), dtype)],
    reference.copies,
    spmd=pieces_of_whole("r"),
    kernel=LazyKernel("jax_deepgemm.ops.rows.kernel", "copies"),
    jvp=_copies_jvp,
    transpose=_copies_transpose,
)
"""TAKE of x by index, whose inverse is position, so that each row of x is read once; rows are whole on each
device."""


def _sums_jvp(primals: list[Any], tangents: list[Any], *, dtype: np.dtype, **options: Any) -> Any:
    return SUMS(tangents[0], primals[1], dtype=dtype, **options)


def _sums_transpose(which: int, cotangents: list[jax.Array], operands: list[Any], **_: Any) -> jax.Array:
    wanted, index = operands
    assert isinstance(wanted, Wanted)
    rows = jnp.broadcast_to(cotangents[0][:, None], (*index.shape, wanted.shape[1]))
    dtypes = (wanted.dtype,)
    return _transpose(0, [rows.reshape(-1, wanted.shape[1])], [wanted, index.reshape(-1)], dtypes=dtypes)


SUMS = Op(
    "sum_rows",
    "m h, t s -> t h",
    lambda x, index, *, dtype: [((index[0], x[1]), dtype)],
    reference.sums,
    kernel=LazyKernel("jax_deepgemm.ops.rows.kernel", "sums"),
    jvp=_sums_jvp,
    transpose=_sums_transpose,
)
