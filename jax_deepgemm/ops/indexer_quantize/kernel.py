"""From the operands of the ops to the problems that their kernel solves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.indexer_quantize.family import FAMILY
from jax_deepgemm.ops.indexer_quantize.problem import RotateProblem


def _of(x: Any, rotate: bool, powers: bool, **cache: Any) -> RotateProblem:
    rows, depth = math.prod(x.shape[:-1]), x.shape[-1]
    return RotateProblem(rows, depth, np.dtype(x.dtype).name, rotate, powers, **cache)


def _rows(avals_in: Sequence[Any], avals_out: Any, *, rotate: bool, powers: bool, **_: Any) -> RotateProblem:
    return _of(avals_in[0], rotate, powers)


def _arrays(
    avals_in: Sequence[Any], avals_out: Any, *, rotate: bool, powers: bool, **_: Any
) -> RotateProblem:
    x, slots, values, _ = avals_in
    assert slots.dtype == np.int32, slots
    return _of(x, rotate, powers, pages=values.shape[0], page=values.shape[1])


def _bytes(
    avals_in: Sequence[Any], avals_out: Any, *, page: int, rotate: bool, powers: bool, **_: Any
) -> RotateProblem:
    x, slots, cache = avals_in
    assert slots.dtype == np.int32, slots
    return _of(x, rotate, powers, pages=cache.shape[0], page=page, joined=True)


quantize = OpKernel(FAMILY, _rows, ("x",))
to_arrays = OpKernel(FAMILY, _arrays, ("x", "slots", "values", "scales"))
to_bytes = OpKernel(FAMILY, _bytes, ("x", "slots", "cache"))
