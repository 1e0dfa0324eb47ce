"""From the operands of the ops to the problem that their kernel solves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.paged_append.family import FAMILY
from jax_deepgemm.ops.paged_append.problem import AppendProblem

PARTS = ("k_new", "v_new", "slots", "k", "v", "k_scale", "v_scale", "layer", "positions", "inv_freq", "q")


def _problem(
    avals_in: Sequence[Any], avals_out: Sequence[Any], *, interleaved: bool, **_: Any
) -> AppendProblem:
    given = dict(zip(PARTS, avals_in, strict=False))
    k_new, v_new, pool = (given[name] for name in ("k_new", "v_new", "k"))
    layers, pages, kv_heads, page, _depth = pool.shape
    pairs = given["inv_freq"].shape[0] if "inv_freq" in given else 0
    return AppendProblem(
        tokens=k_new.shape[0],
        kv_heads=kv_heads,
        head_dim=k_new.shape[2],
        v_head_dim=v_new.shape[2],
        layers=layers,
        pages=pages,
        page=page,
        dtype=np.dtype(k_new.dtype).name,
        stored=np.dtype(pool.dtype).name,
        pairs=pairs,
        interleaved=interleaved and pairs > 0,
        heads=given["q"].shape[1] if "q" in given else 0,
    )


append = OpKernel(FAMILY, _problem, PARTS)
