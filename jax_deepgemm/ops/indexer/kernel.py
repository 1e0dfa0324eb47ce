"""From the operands of the ops to the problem that their kernel solves."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.indexer.family import FAMILY, LogitsProblem
from jax_deepgemm.ops.indexer.fp4 import is_packed

_DTYPES = {"float8_e4m3fn": "e4m3", "bfloat16": "bf16"}


def _problem(
    avals_in: Sequence[Any], avals_out: Sequence[Any], *, columns: int | None = None, **_: Any
) -> LogitsProblem:
    q, k, (out,) = avals_in[0], avals_in[1], avals_out
    return LogitsProblem(
        tokens=q.shape[0],
        keys=k.shape[0],
        columns=out.shape[-1],
        heads=q.shape[1],
        depth=q.shape[2],
        dtype=_DTYPES[np.dtype(q.dtype).name],
        out=np.dtype(out.dtype).name,
        compressed=columns is not None,
        batches=math.prod(out.shape[:-2]),
        packed=is_packed(k),
    )


def _paged(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    joined: bool,
    packed: bool = False,
    of_tokens: bool = False,
    **_: Any,
) -> LogitsProblem:
    q, cache, tables, (out,) = avals_in[0], avals_in[1], avals_in[-1 - of_tokens], avals_out
    depth = q.shape[2]
    row = depth // 2 if packed else depth
    page = cache.shape[1] // (row + 4) if joined else cache.shape[1]
    return LogitsProblem(
        tokens=q.shape[0],
        keys=tables.shape[1] * page,
        columns=out.shape[-1],
        heads=q.shape[1],
        depth=depth,
        out=np.dtype(out.dtype).name,
        compressed=True,
        batches=tables.shape[0],
        page=page,
        pages=cache.shape[0],
        joined=joined,
        packed=packed,
        of_tokens=of_tokens,
    )


_REST = ("weights", "start", "end", "tables", "requests")
paged = OpKernel(FAMILY, functools.partial(_paged, joined=False), ("q", "k", "scales", *_REST))
paged_joined = OpKernel(FAMILY, functools.partial(_paged, joined=True), ("q", "cache", *_REST))
scaled = OpKernel(FAMILY, _problem, ("q", "k", "scales", "weights", "start", "end"))
plain = OpKernel(FAMILY, _problem, ("q", "k", "weights", "start", "end"))
