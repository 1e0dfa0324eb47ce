"""Logits of an indexer in float64, and windows to try."""

from __future__ import annotations

from typing import Any

import numpy as np


def exact(
    q: Any, kv: Any, weights: Any, start: Any, end: Any, columns: int | None = None, rows: int = 64
) -> np.ndarray:
    """float64 [s, n] or [s, columns], some rows at a time."""
    q, kv, weights, start, end = (np.asarray(x) for x in (q, kv, weights, start, end))
    keys = kv.astype(np.float64)
    parts = [
        _rows(*(x[i : i + rows] for x in (q, weights, start, end)), keys, columns)
        for i in range(0, len(q), rows)
    ]
    return np.concatenate(parts)


def _rows(q: Any, weights: Any, start: Any, end: Any, keys: np.ndarray, columns: int | None) -> np.ndarray:
    n = len(keys)
    scores = np.zeros((len(q), n))
    for head in range(q.shape[1]):
        scores += weights[:, head, None] * np.maximum(q[:, head].astype(np.float64) @ keys.T, 0)
    start = np.clip(start.astype(np.int64), 0, n)
    end = np.clip(end.astype(np.int64), start, n)
    first = np.zeros_like(start) if columns is None else start
    key = first[:, None] + np.arange(n if columns is None else columns)[None]
    inside = (key >= start[:, None]) & (key < end[:, None])
    padded = np.concatenate([scores, np.zeros((len(q), 1))], axis=1)
    return np.where(inside, np.take_along_axis(padded, np.clip(key, 0, n), axis=1), -np.inf)


def calc_diff(x: Any, y: Any) -> float:
    """1 - 2 xy / (xx + yy) over all numbers that are finite in y; 0 if all of them are zero."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    inside = np.isfinite(y)
    x, y = x[inside], y[inside]
    energy = (x * x).sum() + (y * y).sum()
    return float(((x - y) ** 2).sum() / energy) if energy else 0.0


def windows(seed: int, tokens: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Some empty, some of all keys, others anywhere."""
    rng = np.random.default_rng(seed)
    start, end = np.sort(rng.integers(0, keys + 1, (2, tokens)), axis=0).astype(np.int32)
    start[::4], end[::4] = 0, keys
    end[3::8] = start[3::8]
    return start, end
