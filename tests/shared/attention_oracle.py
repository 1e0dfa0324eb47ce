"""Attention to pages, rotary embedding and appending in NumPy, float64, one token and one head at a time, and
batches that are drawn for them: pages in any order, shared ones, NaN in all that must not be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Operands of `ragged_paged_attention` as NumPy arrays; k and v are [pages, heads, page, d] as stored."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    k_scale: np.ndarray
    v_scale: np.ndarray
    tables: np.ndarray
    starts: np.ndarray
    lens: np.ndarray

    def cache(self) -> Any:
        from jax_deepgemm.attention import PagedKVCache

        arrays = self.k[None], self.v[None], self.k_scale[None], self.v_scale[None]
        return PagedKVCache(*map(jnp.asarray, arrays))

    def call(self) -> tuple[Any, ...]:
        """The positional operands."""
        return jnp.asarray(self.q), self.cache(), *map(jnp.asarray, (self.tables, self.starts, self.lens))


def draw(
    seed: int,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    v_head_dim: int | None = None,
    page: int = 16,
    dtype: Any = jnp.bfloat16,
    columns: int | None = None,
    spare: int = 3,
    behind: int = 2,
    share: bool = True,
    window: int | None = None,
) -> Batch:
    """A batch of sequences.

    Args:
      q_lens, kv_lens: of each sequence.
      columns: of the tables; None: as many as the longest sequence needs.
      spare: pages that belong to nobody.
      behind: rows of q behind the last sequence.
      share: whether the last two sequences that have one have their first full page in common.
      window: pages of which no row sees a key, are given away: their entry is -1.
    """
    rng = np.random.default_rng(seed)
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    needed = [-(-length // page) for length in kv_lens]
    columns = max([1, *needed]) if columns is None else columns
    pages = sum(needed) + spare
    order = list(rng.permutation(pages))
    tables = rng.choice([-1, -(2**31), 2**31 - 1, pages], (len(kv_lens), columns)).astype(np.int32)
    for i, count in enumerate(needed):
        for j in range(count):
            tables[i, j] = order.pop()
    full = [i for i, length in enumerate(kv_lens) if length >= 2 * page]
    if share and window is None and len(full) > 1:
        tables[full[-1], 0] = tables[full[-2], 0]
    stored = {}
    for name, depth in (("k", head_dim), ("v", v_head_dim)):
        x = np.full((pages, kv_heads, page, depth), np.nan, np.float64)
        for i, length in enumerate(kv_lens):
            for at in range(length):
                x[tables[i, at // page], :, at % page] = rng.standard_normal((kv_heads, depth))
        if np.dtype(dtype) == E4M3:
            x *= 40
        stored[name] = x.astype(dtype)
    if window is not None:
        for i, (n, length) in enumerate(zip(q_lens, kv_lens, strict=True)):
            for j in range(max(0, length - n - window + 1) // page):
                stored["k"][tables[i, j]] = stored["v"][tables[i, j]] = np.nan
                tables[i, j] = -1
    ones = np.dtype(dtype) != E4M3
    scales = [np.ones(kv_heads) if ones else rng.uniform(0.01, 0.05, kv_heads) for _ in range(2)]
    tokens = sum(q_lens) + behind
    q = rng.standard_normal((tokens, heads, head_dim))
    return Batch(
        q.astype(jnp.bfloat16 if not ones else dtype),
        stored["k"],
        stored["v"],
        *(x.astype(np.float32) for x in scales),
        tables,
        np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32),
        np.asarray(kv_lens, np.int32),
    )


def attention(
    b: Batch,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: np.ndarray | None = None,
    alibi_slopes: np.ndarray | None = None,
    scale: float | None = None,
    max_q_len: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """out [t, heads, v_head_dim] and lse [t, heads] in float64."""
    tokens, heads, depth = b.q.shape
    pages, kv_heads, page, _ = b.k.shape
    scale = depth**-0.5 if scale is None else scale
    sink = np.full(heads, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    out, lse = np.zeros((tokens, heads, b.v.shape[-1])), np.tile(sink, (tokens, 1))
    for i in range(len(b.lens)):
        first, end, length = int(b.starts[i]), int(b.starts[i + 1]), int(b.lens[i])
        for row in range(first, end):
            at = length - (end - first) + row - first
            if at < 0 or (max_q_len is not None and row - first >= max_q_len):
                continue
            last = at if causal else length - 1
            begin = 0 if window is None else max(0, at - window + 1)
            keys = [key for key in range(begin, last + 1) if 0 <= b.tables[i, key // page] < pages]
            if not keys:
                continue
            where = b.tables[i, np.array(keys) // page], np.array(keys) % page
            for h in range(heads):
                g = h // (heads // kv_heads)
                k = b.k[where[0], g, where[1]].astype(np.float64) * float(b.k_scale[g])
                v = b.v[where[0], g, where[1]].astype(np.float64) * float(b.v_scale[g])
                score = k @ b.q[row, h].astype(np.float64) * scale
                if softcap is not None:
                    score = softcap * np.tanh(score / softcap)
                if alibi_slopes is not None:
                    score = score + float(alibi_slopes[h]) * (np.array(keys) - at)
                most = max(score.max(), sink[h])
                weights = np.exp(score - most)
                total = weights.sum() + np.exp(sink[h] - most)
                out[row, h], lse[row, h] = weights @ v / total, np.log(total) + most
    return out, lse


def rotary(
    x: np.ndarray, positions: np.ndarray, inv_freq: np.ndarray, interleaved: bool = False
) -> np.ndarray:
    """x [t, heads, d] in float64. Angles are products rounded to float32."""
    out, pairs = x.astype(np.float64), len(inv_freq)
    for t in range(len(x)):
        for i in range(pairs):
            angle = float(np.float32(positions[t]) * np.float32(inv_freq[i]))
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
            cos, sin = np.cos(angle), np.sin(angle)
            old_a, old_b = x[t, :, a].astype(np.float64), x[t, :, b].astype(np.float64)
            out[t, :, a], out[t, :, b] = old_a * cos - old_b * sin, old_a * sin + old_b * cos
    return out


def append(
    pages: np.ndarray, rows: np.ndarray, slots: np.ndarray, scale: np.ndarray | None = None
) -> np.ndarray:
    """Pages [p, heads, page, d] with rows [t, heads, d] at their slots, in the dtype of the pages."""
    out, size = pages.copy(), pages.shape[2]
    if scale is not None:
        rows = np.clip(rows / scale[:, None].astype(np.float64), -448, 448)
    for row, slot in zip(rows, slots, strict=True):
        if 0 <= slot < len(pages) * size:
            out[slot // size, :, slot % size] = row.astype(pages.dtype)
    return out
