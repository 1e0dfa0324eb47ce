"""Numbers that dense GEMMs are compared with: NumPy in float64, independent of the package's references."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.shared.cases import ROW, Case


def calc_diff(x: Any, y: Any) -> float:
    """1 - 2 x.y / (x.x + y.y) over all elements, in float64; 0 for two zeros, NaN if there is a NaN."""
    x, y = np.asarray(x).astype(np.float64), np.asarray(y).astype(np.float64)
    energy = float((x * x + y * y).sum())
    return 1 - 2 * float((x * y).sum()) / energy if energy else 0.0


def scales_of(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.exp2(rng.uniform(-3, 3, shape)).astype(np.float32)


def fp8_operands(case: Case, seed: int = 0) -> list[Any]:
    """Random stored values and scales (not from a quantiser), K-major: a, sa, b, sb[, c]."""
    rng = np.random.default_rng(seed)
    m, n, k = case.m, case.n, case.k
    blocks = -(-k // 128)
    a = rng.standard_normal((m, k)).astype(jnp.dtype(case.a_dtype))
    b = rng.standard_normal((n, k)).astype(jnp.dtype(case.b_dtype))
    rows = n if case.b_block == ROW else -(-n // 128)
    arrays = [a, scales_of(rng, m, blocks), b, scales_of(rng, rows, blocks)]
    if case.accumulate:
        arrays.append((32 * rng.standard_normal((m, n))).astype(jnp.dtype(case.out)))
    return [jnp.asarray(x) for x in arrays]


def bf16_operands(case: Case, seed: int = 0) -> list[jax.Array]:
    """Standard normal operands as the case's layout stores them: a, b[, c]."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((case.m, case.k) if case.layout[0] == "n" else (case.k, case.m))
    b = rng.standard_normal((case.n, case.k) if case.layout[1] == "t" else (case.k, case.n))
    arrays = [jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)]
    if case.accumulate:
        arrays.append(jnp.asarray(32 * rng.standard_normal((case.m, case.n)), case.out))
    return arrays


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def fp8_float64(case: Case, a: Any, sa: Any, b: Any, sb: Any, c: Any = None) -> np.ndarray:
    """The sum over blocks of k of scaled partial products, as the contract writes it."""
    a, sa, b, sb = map(_wide, (a, sa, b, sb))
    d = np.zeros((case.m, case.n)) if c is None else _wide(c)
    row = np.arange(case.n) if case.b_block == ROW else np.arange(case.n) // 128
    for block in range(-(-case.k // 128)):
        columns = slice(128 * block, 128 * (block + 1))
        d = d + (a[:, columns] @ b[:, columns].T) * np.outer(sa[:, block], sb[row, block])
    return d


def bf16_float64(case: Case, a: Any, b: Any, c: Any = None) -> np.ndarray:
    a, b = _wide(a), _wide(b)
    d = (a.T if case.layout[0] == "t" else a) @ (b.T if case.layout[1] == "t" else b)
    return d if c is None else d + _wide(c)


def assert_rounded(got: Any, exact: np.ndarray, terms: int) -> None:
    """`got` is the float64 `exact`, summed over `terms` in float32 and rounded once to got's dtype."""
    assert got.shape == exact.shape
    if not exact.size:
        return
    scale = np.abs(exact).max() + 1e-30
    once = {"bfloat16": 2.0**-8, "float32": 2.0**-23}[np.dtype(got.dtype).name]
    error = np.abs(_wide(got) - exact)
    sums = max(terms, 1) ** 0.5 * 2.0**-21 * scale
    assert np.all(error <= once * np.abs(exact) + sums), (error.max(), scale)
