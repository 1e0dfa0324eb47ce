"""Operands of attention's kernels, drawn for a problem, and what comes of them in float64."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from jax_deepgemm.ops.attention.problem import AttentionProblem
from tests.shared.attention_oracle import Batch, attention

DTYPES = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
}
NO_PAGES = (-1, -(2**31), 2**31 - 1)


def attend(p: AttentionProblem, operands: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The output, and the logarithms of denominators."""
    layer = int(operands["layer"][0])
    exists = 0 <= layer < p.layers
    parts = (operands[part][layer if exists else 0] for part in ("k", "v", "k_scale", "v_scale"))
    tables = operands["tables"] if exists else np.full_like(operands["tables"], -1)
    return attention(
        Batch(operands["q"], *parts, tables, operands["cu_q_lens"], operands["kv_lens"]),
        causal=p.causal,
        window=p.window or None,
        softcap=p.softcap or None,
        sinks=operands["sinks"] if p.with_sinks else None,
        alibi_slopes=operands["slopes"] if p.with_slopes else None,
        scale=p.scale,
        max_q_len=p.max_q_len or None,
    )


def draw(
    p: AttentionProblem, lengths: Sequence[tuple[int, int]], seed: int, missing: float = 0.0
) -> dict[str, np.ndarray]:
    """Operands for sequences of so many queries and keys; NaN where nothing may be read, in memory as in
    tables' unused places, and in pages that a window has left. Of the pages that are used, a part is not in
    the pool."""
    rng, kind = np.random.default_rng(seed), DTYPES[p.kv_dtype]
    k = np.full((p.layers, p.pages, p.kv_heads, p.page, p.depth), np.nan, kind)
    v = np.full((*k.shape[:-1], p.v_depth), np.nan, kind)
    tables = rng.choice([*NO_PAGES, p.pages, *range(p.pages)], (p.seqs, p.table_pages)).astype(np.int32)
    free, layer = list(rng.permutation(p.pages)), p.layers - 1
    for i, (count, length) in enumerate(lengths):
        left = length - count - p.window + 1 if p.window else 0
        for at in range(0, min(length, p.table_pages * p.page), p.page):
            page, used = free.pop(), min(p.page, length - at) if at + p.page > left else 0
            k[layer, page, :, :used] = rng.standard_normal((p.kv_heads, used, p.depth))
            v[layer, page, :, :used] = rng.standard_normal((p.kv_heads, used, p.v_depth))
            tables[i, at // p.page] = rng.choice([*NO_PAGES, p.pages]) if rng.random() < missing else page
    q = rng.standard_normal((p.tokens, p.heads, p.depth))
    q[::2] *= 8  # scores that rise by much from tile to tile
    scales = rng.uniform(0.25, 2.0, (2, p.layers, p.kv_heads)).astype(np.float32)
    if p.kv_dtype != "e4m3":
        scales[:] = 1.0
    return {
        "q": q.astype(DTYPES[p.q_dtype]),
        "k": k,
        "v": v,
        "k_scale": scales[0],
        "v_scale": scales[1],
        "tables": tables,
        "cu_q_lens": np.cumsum([0, *(count for count, _ in lengths)]).astype(np.int32),
        "kv_lens": np.array([length for _, length in lengths], np.int32),
        "layer": np.array([layer], np.int32),
        "sinks": rng.standard_normal(p.heads).astype(np.float32),
        "slopes": (2.0 ** -np.arange(1, p.heads + 1)).astype(np.float32),
    }
