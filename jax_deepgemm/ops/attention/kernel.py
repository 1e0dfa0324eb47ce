"""From the operands of the op to the problem that its kernels solve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.attention.family import FAMILY
from jax_deepgemm.ops.attention.problem import AttentionProblem

_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float8_e4m3fn": "e4m3"}


def _problem(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    with_sinks: bool,
    with_slopes: bool,
    max_q_len: int,
    split: int,
    **_: Any,
) -> AttentionProblem:
    q, k, v, _, _, tables, *_rest = avals_in
    layers, pages, kv_heads, page, depth = k.shape
    return AttentionProblem(
        tokens=q.shape[0],
        seqs=tables.shape[0],
        table_pages=tables.shape[1],
        pages=pages,
        page=page,
        layers=layers,
        heads=q.shape[1],
        kv_heads=kv_heads,
        depth=depth,
        v_depth=v.shape[-1],
        q_dtype=_DTYPES[np.dtype(q.dtype).name],
        kv_dtype=_DTYPES[np.dtype(k.dtype).name],
        window=window,
        softcap=softcap,
        causal=causal,
        with_sinks=with_sinks,
        with_slopes=with_slopes,
        max_q_len=max_q_len,
        split=split,
        scale=scale,
    )


PARTS = (
    *("q", "k", "v", "k_scale", "v_scale", "tables", "cu_q_lens", "kv_lens", "layer"),
    *("sinks", "slopes"),
)
attention = OpKernel(FAMILY, _problem, PARTS)
