"""Latent attention in NumPy, float64, token by token, and batches to try it on."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from jax_deepgemm.ops.mla.problem import MlaProblem

DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}
NOWHERE = (-1, -(2**31), 2**31 - 1)
Operands = dict[str, np.ndarray]


def attend(p: MlaProblem, operands: Operands) -> tuple[np.ndarray, np.ndarray]:
    """out [t, h, v] and lse [t, h]."""
    q, layer = operands["q"].astype(np.float64), int(operands["layer"][0])
    out, lse = np.zeros((p.tokens, p.heads, p.v_depth)), np.full((p.tokens, p.heads), -np.inf)
    if not 0 <= layer < p.layers:
        return out, lse
    rows = operands["cache"][layer].reshape(-1, p.depth)
    for token, seen in seen_slots(p, operands):
        if not len(seen):
            continue
        keys = rows[seen].astype(np.float64)
        scores = q[token] @ keys.T * p.scale
        most = scores.max(axis=1, keepdims=True)
        weights = np.exp(scores - most)
        total = weights.sum(axis=1, keepdims=True)
        out[token], lse[token] = weights @ keys[:, : p.v_depth] / total, (np.log(total) + most)[:, 0]
    return out, lse


def seen_slots(p: MlaProblem, operands: Operands) -> list[tuple[int, np.ndarray]]:
    """The slots that each token sees."""
    tables, found = operands["tables"].astype(np.int64), []
    if p.sparse:
        return [(t, named[(named >= 0) & (named < p.pages * p.page)]) for t, named in enumerate(tables)]
    ends = np.clip(operands["cu_q_lens"].astype(np.int64), 0, p.tokens)
    for i, table in enumerate(tables):
        first, count = ends[i], max(ends[i + 1] - ends[i], 0)
        length = int(np.clip(operands["kv_lens"][i], 0, p.columns * p.page))
        for j in range(min(count, p.max_q_len or count)):
            position = length - count + j
            keys = np.arange(0 if position < 0 else position + 1 if p.causal else length)
            pages = table[keys // p.page]
            there = (pages >= 0) & (pages < p.pages)
            found.append((int(first + j), pages[there] * p.page + keys[there] % p.page))
    return found


def draw(p: MlaProblem, lengths: Sequence[tuple[int, int]], seed: int, missing: float = 0.0) -> Operands:
    """Sequences of so many tokens and keys, pages in any order; NaN where nothing may be read, and in tables'
    unused places pages that there are not. Of the pages that are used, a part is not in the cache."""
    rng, kind = np.random.default_rng(seed), DTYPES[p.dtype]
    cache = np.full((p.layers, p.pages, p.page, p.depth), np.nan, kind)
    tables = rng.choice(NOWHERE, (p.seqs, p.columns)).astype(np.int32)
    free, layer = list(rng.permutation(p.pages)), int(rng.integers(p.layers))
    for i, (_, length) in enumerate(lengths):
        for page in range(-(-length // p.page)):
            if rng.random() < missing:
                continue
            at = tables[i, page] = free.pop()
            count = min(p.page, length - page * p.page)
            cache[layer, at, :count] = rng.standard_normal((count, p.depth))
    starts = np.cumsum([0, *(count for count, _ in lengths)])
    return {
        "q": rng.standard_normal((p.tokens, p.heads, p.depth)).astype(kind),
        "cache": cache,
        "tables": tables,
        "cu_q_lens": starts.astype(np.int32),
        "kv_lens": np.array([length for _, length in lengths], np.int32),
        "layer": np.array([layer], np.int32),
    }


def draw_sparse(p: MlaProblem, seed: int, missing: float = 0.2) -> Operands:
    """Tokens that name slots, a part of which there are not; one names none. Other slots are NaN."""
    rng, kind = np.random.default_rng(seed), DTYPES[p.dtype]
    slots, layer = p.pages * p.page, int(rng.integers(p.layers))
    known = rng.permutation(slots)[: slots // 2]
    named = rng.choice(known, (p.tokens, p.columns))
    named = np.where(rng.random(named.shape) < missing, rng.choice([*NOWHERE, slots], named.shape), named)
    named[p.tokens // 2] = -1
    cache = np.full((p.layers, slots, p.depth), np.nan, kind)
    cache[layer, known] = rng.standard_normal((len(known), p.depth))
    return {
        "q": rng.standard_normal((p.tokens, p.heads, p.depth)).astype(kind),
        "cache": cache.reshape(p.layers, p.pages, p.page, p.depth),
        "tables": named.astype(np.int32),
        "layer": np.array([layer], np.int32),
    }
