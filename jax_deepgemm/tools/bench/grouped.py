"""The grouped problems: expert layers of DeepSeek-V3, FP8 and BF16, and `ragged_dot` beside JAX's own.

DeepGEMM's figures were recorded with group sizes of 0.7 to 1.3 times the expected ones, which are not known
any more, but their sum is: rows = us * TFLOP/s / (2 n k), the same for every (n, k) of a (groups, m) within
the rounding. So the sizes here are drawn in the same way, once and for all, with the same sum.

Contiguous groups are measured twice: "padded" with sizes that are multiples of 128, as DeepGEMM needs them
and as its figures count, which is the same work; and "drawn" without the padding, whose rate counts only the
rows that are there, and whose time is compared with that of the padded problem that DeepGEMM makes of it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepgemm.tools.bench.dense import first_rows
from jax_deepgemm.tools.bench.machine import ClockLog
from jax_deepgemm.tools.bench.rows import (
    COMPILE_THREADS,
    KERNEL_PREFIX,
    Compiled,
    accumulator,
    compile_job,
    figures,
    names,
)
from jax_deepgemm.tools.bench.timing import Job, Timing, time_jobs

NK = ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))
KINDS = ("fp8", "bf16")
CONTIGUOUS = {(4, 8192): 268 * 128, (8, 4096): 266 * 128, (32, 256): 83 * 128}
"""(groups, rows expected per group) -> rows of all groups, padded."""
MASKED = {(32, 192): (6560, 4096), (6, 1024): (6261, 4096), (32, 20): (670, 1024), (6, 20): (121, 1024)}
"""(groups, rows expected per group) -> (valid rows of all groups, rows of A per group)."""
INNER = {(4, 8192): 268 * 128, (8, 4096): 266 * 128, (16, 2048): 271 * 128}
"""(groups, k expected per group) -> k of all groups."""
GRADIENTS = ((4096, 7168), (7168, 2048))
RAGGED = (
    (4, 8192, 6144, 7168),
    (8, 4096, 4096, 4096),
    (8, 4096, 7168, 3072),
    (32, 256, 7168, 3072),
    (32, 20, 6144, 7168),
)
UNIT = 128  # rows that DeepGEMM pads groups to
RAGGED_CALLS = 3  # of jax.lax.ragged_dot, 14 ms each
RAGGED_LIMIT = 40 << 30  # bytes: it computes every row with every group


@dataclass(frozen=True)
class Problem:
    """One row of a table.

    Attributes:
      table: "m_grouped", "masked", "k_grouped" or "ragged_dot".
      type: "fp8" or "bf16".
      sizes: "padded" or "drawn" for m_grouped, else "drawn".
      groups, m, n, k: as the figures are named: m (of k_grouped: k) is the expected size of a group.
      group_sizes: rows (of k_grouped: columns) of each group.
      capacity: rows per group that A has; of masked problems only.
    """

    table: str
    type: str
    sizes: str
    groups: int
    m: int
    n: int
    k: int
    group_sizes: tuple[int, ...]
    capacity: int = 0

    def __str__(self) -> str:
        return f"{self.table} {self.type} {self.sizes} groups={self.groups} m={self.m} n={self.n} k={self.k}"

    @property
    def total(self) -> int:
        return sum(self.group_sizes)

    @property
    def flops(self) -> int:
        return 2 * self.total * self.n * (self.m if self.table == "k_grouped" else self.k)

    @property
    def bytes(self) -> int:
        """Of A, B and D, and of C where there is one; rows outside all groups and scales not counted."""
        operand = 2 if self.type == "bf16" else 1
        if self.table == "k_grouped":
            return operand * self.total * (self.m + self.n) + 8 * self.groups * self.m * self.n
        weights = operand * self.groups * self.n * self.k
        return weights + self.total * (operand * self.k + 2 * self.n)

    @property
    def row(self) -> dict[str, Any]:
        keys = ("table", "type", "sizes", "groups", "m", "n", "k")
        return {key: getattr(self, key) for key in keys} | {"group_sizes": list(self.group_sizes)}


@functools.cache
def draw_sizes(groups: int, expected: int, total: int, unit: int = 1) -> tuple[int, ...]:
    """Returns sizes of 0.7 to 1.3 times the expected whose sum, each padded to `unit`, is `total`.

    They are those of the first seed that gives this sum, so always the same.

    >>> sizes = draw_sizes(32, 256, 83 * 128, unit=128)
    >>> sum(padded(sizes)) == 83 * 128, all(179 <= size <= 332 for size in sizes)
    (True, True)
    """
    for seed in itertools.count():
        drawn = np.random.default_rng(seed).uniform(0.7, 1.3, groups) * expected
        sizes = tuple(int(size) for size in drawn)
        if sum(padded(sizes, unit)) == total:
            return sizes
    raise AssertionError


def padded(sizes: Sequence[int], unit: int = UNIT) -> tuple[int, ...]:
    """Returns each size rounded up to a multiple of `unit`."""
    return tuple(-(-size // unit) * unit for size in sizes)


def tables() -> dict[str, list[Problem]]:
    """Returns the problems of each table, those with the same B side by side.

    >>> {name: len(rows) for name, rows in tables().items()}
    {'m_grouped': 48, 'masked': 32, 'k_grouped': 12, 'ragged_dot': 5}
    """
    return _tables(CONTIGUOUS, MASKED, INNER, NK, GRADIENTS, RAGGED)


def small_tables() -> dict[str, list[Problem]]:
    """Returns a few small problems, to try the machinery where there is no GPU."""
    return _tables(
        {(2, 128): 384}, {(2, 8): (14, 16)}, {(2, 128): 256}, ((128, 256),), ((64, 128),), ((2, 16, 128, 64),)
    )


def _tables(
    contiguous: Any, masked: Any, inner: Any, weights: Any, gradients: Any, ragged: Any
) -> dict[str, list[Problem]]:
    found: dict[str, list[Problem]] = {"m_grouped": [], "masked": [], "k_grouped": [], "ragged_dot": []}
    for (groups, m), total in contiguous.items():
        drawn = draw_sizes(groups, m, total, UNIT)
        found["m_grouped"] += [
            Problem("m_grouped", kind, how, groups, m, n, k, sizes)
            for n, k in weights
            for kind in KINDS
            for how, sizes in (("padded", padded(drawn)), ("drawn", drawn))
        ]
    for (groups, m), (total, capacity) in masked.items():
        sizes = draw_sizes(groups, m, total)
        found["masked"] += [
            Problem("masked", kind, "drawn", groups, m, n, k, sizes, capacity)
            for n, k in weights
            for kind in KINDS
        ]
    for (groups, k), total in inner.items():
        sizes = padded(draw_sizes(groups, k, total, UNIT))
        found["k_grouped"] += [
            Problem("k_grouped", kind, "drawn", groups, m, n, k, sizes)
            for m, n in gradients
            for kind in KINDS
        ]
    found["ragged_dot"] = [
        Problem("ragged_dot", "bf16", "drawn", groups, m, n, k, draw_sizes(groups, m, groups * m))
        for groups, m, n, k in ragged
    ]
    return found


# Operands and products ------------------------------------------------------------------------------------


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=range(4))
def _draw(table: str, rows: tuple[int, ...], n: tuple[int, ...], fp8: bool) -> tuple[Any, Any]:
    """A and B in bfloat16, or quantised: K-grouped operands as [rows, k]."""
    import jax_deepgemm

    a, b = _normal(0, *rows), _normal(1, *n)
    if not fp8:
        return a, b
    if table == "k_grouped":
        return jax_deepgemm.quantize(a.T), jax_deepgemm.quantize(b.T)
    return jax_deepgemm.quantize(a), jax_deepgemm.quantize(b, block=(128, 128))


def operands(problem: Problem) -> tuple[Any, ...]:
    """Draws A and B (standard normal), C of ones where there is one, and the group sizes, last."""
    sizes = jnp.asarray(problem.group_sizes, jnp.int32)
    fp8 = problem.type == "fp8"
    if problem.table == "k_grouped":
        a, b = _draw("k_grouped", (problem.total, problem.m), (problem.total, problem.n), fp8)
        return a, b, jnp.ones((problem.groups, problem.m, problem.n), jnp.float32), sizes
    matrix = (problem.k, problem.n) if problem.table == "ragged_dot" else (problem.n, problem.k)
    if problem.table == "masked":
        rows = (problem.groups, problem.capacity, problem.k)
        return *_draw(problem.table, rows, (problem.groups, *matrix), fp8), sizes
    most = sum(padded(problem.group_sizes))  # one program draws for padded and for drawn sizes
    a, b = _draw(problem.table, (most, problem.k), (problem.groups, *matrix), fp8)
    return first_rows(a, problem.total), b, sizes


def product(problem: Problem) -> Callable[..., jax.Array]:
    """Returns this package's function for the problem."""
    import jax_deepgemm as jdg

    if problem.table == "ragged_dot":
        return jdg.ragged_dot
    if problem.table == "m_grouped":
        fp8, bf16 = jdg.m_grouped_fp8_gemm_nt_contiguous, jdg.m_grouped_bf16_gemm_nt_contiguous
        return fp8 if problem.type == "fp8" else bf16
    if problem.table == "masked":
        masked = (
            jdg.m_grouped_fp8_gemm_nt_masked if problem.type == "fp8" else jdg.m_grouped_bf16_gemm_nt_masked
        )
        return functools.partial(masked, expected_m=problem.m)
    inner = (
        jdg.k_grouped_fp8_gemm_nt_contiguous
        if problem.type == "fp8"
        else jdg.k_grouped_bf16_gemm_tn_contiguous
    )
    return lambda a, b, c, sizes: inner(a, b, sizes, c, out_dtype=jnp.float32)


# Measuring ------------------------------------------------------------------------------------------------


def measure(
    problems: Sequence[Problem], *, calls: int, flush: Callable[[], None], clocks: ClockLog | None
) -> Iterator[dict[str, Any]]:
    """Measures problems, those of one shape in one profiler session; yields a row for each."""
    for _, same_shape in groupby(problems, key=lambda p: (p.table, p.groups, p.m, p.n, p.k)):
        group = list(same_shape)
        try:
            drawn = [operands(problem) for problem in group]
        except Exception as error:
            text = f"operands: {type(error).__name__}: {error}"[:400]
            yield from (problem.row | {"status": "failed", "error": text} for problem in group)
            continue
        yield from measure_group(group, drawn, calls, flush, clocks)


def measure_group(
    group: Sequence[Problem],
    drawn: Sequence[tuple[Any, ...]],
    calls: int,
    flush: Callable[[], None],
    clocks: ClockLog | None,
) -> Iterator[dict[str, Any]]:
    """Measures problems whose operands are drawn in one profiler session; yields a row for each."""
    on_gpu = jax.default_backend() == "gpu"
    ours = names("jdg_grouped", group)
    with ThreadPoolExecutor(COMPILE_THREADS) as pool:
        compiling = functools.partial(compile_job, carry=accumulator(group[0].table))
        compiled = list(pool.map(compiling, map(product, group), ours, drawn))
    prefix = KERNEL_PREFIX if on_gpu else ""
    jobs = [Job(name, each.run, prefix) for name, each in zip(ours, compiled, strict=True) if each.run]
    timings = time_jobs(jobs, calls=calls, flush=flush, clocks=clocks)
    for problem, name, each, arguments in zip(group, ours, compiled, drawn, strict=True):
        row = problem.row | {"compile_ms": round(each.milliseconds, 1)}
        row |= figures(problem, timings.get(name), each.error)
        if problem.table == "ragged_dot":
            row["baseline"] = _ragged_dot_of_jax(problem, arguments, flush, clocks)
        yield row


def _ragged_dot_of_jax(
    problem: Problem, arguments: tuple[Any, ...], flush: Callable[[], None], clocks: ClockLog | None
) -> dict[str, Any]:
    about = {"what": "jax.lax.ragged_dot"}
    needed = problem.groups * problem.total * (2 * problem.k + 4 * problem.n)
    if needed > RAGGED_LIMIT:
        return about | {"status": "skipped", "error": f"would need about {needed >> 30} GiB"}
    compiled: Compiled = compile_job(lax.ragged_dot, "lax_ragged_dot", arguments)
    timing: Timing | None = None
    if compiled.run:
        jobs = [Job("lax_ragged_dot", compiled.run)]
        timing = time_jobs(jobs, calls=RAGGED_CALLS, flush=flush, clocks=clocks)["lax_ragged_dot"]
    return about | figures(problem, timing, compiled.error)
