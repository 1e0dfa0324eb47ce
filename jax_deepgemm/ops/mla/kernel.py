"""From the operands of the ops to the problem that their kernels solve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.mla.family import FAMILY
from jax_deepgemm.ops.mla.problem import MlaProblem

_DTYPES = {"bfloat16": "bf16", "float16": "f16"}


def _problem(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    scale: float,
    v_head_dim: int,
    causal: bool = False,
    max_q_len: int = 0,
    split: int = 0,
    **_: Any,
) -> MlaProblem:
    q, cache, tables, *rest = avals_in
    layers, pages, page, depth = cache.shape
    return MlaProblem(
        tokens=q.shape[0],
        heads=q.shape[1],
        seqs=tables.shape[0],
        columns=tables.shape[1],
        pages=pages,
        page=page,
        layers=layers,
        depth=depth,
        v_depth=v_head_dim,
        dtype=_DTYPES[np.dtype(q.dtype).name],
        causal=causal,
        sparse=len(rest) == 1,
        max_q_len=max_q_len,
        split=split,
        scale=scale,
    )


paged = OpKernel(FAMILY, _problem, ("q", "cache", "tables", "cu_q_lens", "kv_lens", "layer"))
sparse = OpKernel(FAMILY, _problem, ("q", "cache", "tables", "layer"))
