"""The largest numbers of rows, by sorting each with NumPy; rows that are hard to choose from."""

from __future__ import annotations

from typing import Any

import numpy as np


def topk(x: Any, k: int, start: Any = None, end: Any = None, by_index: bool = False) -> np.ndarray:
    """Columns of the k largest of each row, of equal ones the lower first; -1 behind them."""
    rows = np.asarray(x).astype(np.float64)
    m, n = rows.shape
    column = np.arange(n)
    found = np.full((m, k), -1, np.int32)
    starts, ends = (np.broadcast_to(d if one is None else one, (m,)) for one, d in ((start, 0), (end, n)))
    for i, row in enumerate(rows):
        counts = (column >= starts[i]) & (column < ends[i]) & (row > -np.inf)
        best = column[counts][np.argsort(-row[counts], kind="stable")][:k]
        found[i, : len(best)] = np.sort(best) if by_index else best
    return found


def values(x: Any, indices: np.ndarray) -> np.ndarray:
    """The numbers at columns, -infinity at -1."""
    x = np.asarray(x)
    taken = np.take_along_axis(x, np.maximum(indices, 0), axis=1)
    return np.where(indices < 0, np.asarray(-np.inf, x.dtype), taken)


HARD = (
    "normal", "equal", "ascending", "descending", "one huge", "few numbers", "no number", "zeros", "denormal",
    "two values", "special", "blocks", "sparse peaks", "negative", "infinite", "two scales",
)  # fmt: skip


def row(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """A row of float32."""
    x = rng.standard_normal(n).astype(np.float32)
    if kind == "equal":
        x[:] = -3.25
    elif kind == "ascending":
        x = np.sort(x)
    elif kind == "descending":
        x = -np.sort(x)
    elif kind == "one huge":
        x[rng.integers(n)] = 3e38
    elif kind == "few numbers":
        x[rng.random(n) > min(5 / n, 0.5)] = rng.choice([-np.inf, np.nan])
    elif kind == "no number":
        x[:] = rng.choice(np.array([-np.inf, np.nan, -np.nan], np.float32), n)
    elif kind == "zeros":
        x = np.where(rng.random(n) < 0.5, np.float32(-0.0), np.float32(0.0))
    elif kind == "denormal":
        x = (x * 1e-40).astype(np.float32)
    elif kind == "two values":
        x = np.where(rng.random(n) < 0.3, np.float32(1), np.float32(-1))
    elif kind == "special":
        specials = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3.4028235e38])
        x = np.where(rng.random(n) < 0.4, rng.choice(specials, n), x).astype(np.float32)
    elif kind == "blocks":
        x = np.where(np.arange(n) // 16 % 61 == 7, x + 100, x)
    elif kind == "sparse peaks":
        x = np.where(np.arange(n) % 997 == 0, np.float32(1e30), x * 1e-3)
    elif kind == "negative":
        x = -np.abs(x) * np.float32(1e20)
    elif kind == "two scales":
        few = np.arange(n) % max(n // 40, 2) == 1
        x = np.where(few, np.float32(1e30) * (2 + x), 1 + x * np.float32(1e-5))
    elif kind == "infinite":
        x = np.where(rng.random(n) < 0.6, np.float32(np.inf), x)
    return x.astype(np.float32)


def rows(n: int, seed: int = 0, kinds: tuple[str, ...] = HARD) -> np.ndarray:
    """One of each kind, [kinds, n]."""
    rng = np.random.default_rng(seed)
    return np.stack([row(kind, n, rng) for kind in kinds])


def windows(m: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """First and last columns, some of them outside a row, or of nothing."""
    rng = np.random.default_rng(seed)
    start, end = rng.integers(-3, n + 1, (2, m))
    start, end = np.where(rng.random(m) < 0.8, [np.minimum(start, end), np.maximum(start, end)], [start, end])
    start[:3], end[:3] = [-(2**31), 0, 2**31 - 1][: len(start[:3])], [2**31 - 1, n, -(2**31)][: len(end[:3])]
    return start.astype(np.int32), end.astype(np.int32)
