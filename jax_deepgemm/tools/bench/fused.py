"""The memory-bound kernels, each beside a copy of as many bytes in the same process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.tools.bench.machine import ClockLog
from jax_deepgemm.tools.bench.rows import COMPILE_THREADS, KERNEL_PREFIX, compile_job, figures, names
from jax_deepgemm.tools.bench.timing import Job, time_jobs

SHAPES = ((32768, 7168), (32768, 4096))
# What is read and written of each element of [m, n], in bytes; scales, a 64th of it, not counted.
BYTES = {
    "quantize_1x128": 2 + 1,
    "quantize_128x128": 2 + 1,
    "quantize_128x1": 2 + 1,
    "quantize_both": 2 + 2,
    "quantize_weight": 2 + 2,
    "swiglu_quantize": 4 + 2,
    "swiglu_grad_quantize": 6 + 4,
}
COPY_COLUMNS = 1 << 11


@dataclass(frozen=True)
class Problem:
    """One row: `kind` is a name in BYTES, [m, n] what is quantised (of swiglu: act, n features)."""

    kind: str
    m: int
    n: int

    def __str__(self) -> str:
        return f"quantize {self.kind} m={self.m} n={self.n}"

    @property
    def flops(self) -> int:
        return 0

    @property
    def bytes(self) -> int:
        return BYTES[self.kind] * self.m * self.n


def tables() -> dict[str, list[Problem]]:
    """Returns the problems of the table, those of equal shape side by side.

    >>> {name: len(rows) for name, rows in tables().items()}
    {'quantize': 14}
    """
    return {"quantize": [Problem(kind, m, n) for m, n in SHAPES for kind in BYTES]}


def small_tables() -> dict[str, list[Problem]]:
    """Returns a few small problems, to try the machinery where there is no GPU."""
    return {"quantize": [Problem(kind, 256, 512) for kind in ("quantize_both", "swiglu_quantize")]}


def operands(problem: Problem) -> tuple[jax.Array, ...]:
    """Draws x, or h, weight and dact, standard normal in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 3)
    m, n = problem.m, problem.n
    if not problem.kind.startswith("swiglu"):
        return (jax.random.normal(keys[0], (m, n), jnp.bfloat16),)
    h, weight = jax.random.normal(keys[0], (m, 2 * n), jnp.bfloat16), jax.random.uniform(keys[1], (m,))
    if problem.kind == "swiglu_quantize":
        return h, weight
    return h, weight, jax.random.normal(keys[2], (m, n), jnp.bfloat16)


def function(problem: Problem) -> Callable[..., Any]:
    """Returns this package's function for the problem."""
    from jax_deepgemm.ops import quantize as quantization
    from jax_deepgemm.ops import swiglu as activation
    from jax_deepgemm.ops.quantize import fused

    if problem.kind.startswith("swiglu"):
        return getattr(activation, problem.kind)
    if problem.kind in ("quantize_both", "quantize_weight"):
        return getattr(fused, problem.kind)
    rows, cols = map(int, problem.kind.removeprefix("quantize_").split("x"))
    return lambda x: quantization.quantize(x, (rows, cols))


def _copy_operand(problem: Problem) -> jax.Array:
    """Half of the problem's bytes."""
    return jnp.zeros((-(-problem.bytes // (8 * COPY_COLUMNS)), COPY_COLUMNS), jnp.uint32)


def _copy(x: jax.Array) -> jax.Array:
    """Reads and writes every element; a plain copy could become no kernel at all."""
    return x + 1


def measure(
    problems: Sequence[Problem], *, calls: int, flush: Callable[[], None], clocks: ClockLog | None
) -> Iterator[dict[str, Any]]:
    """Measures problems, each shape in one profiler session; yields a row for each."""
    for _, same_shape in groupby(problems, key=lambda problem: (problem.m, problem.n)):
        yield from _measure_group(list(same_shape), calls=calls, flush=flush, clocks=clocks)


def _measure_group(
    group: Sequence[Problem], *, calls: int, flush: Callable[[], None], clocks: ClockLog | None
) -> Iterator[dict[str, Any]]:
    on_gpu = jax.default_backend() == "gpu"
    ours, theirs = names("quantize_row", group), names("copy_row", group)
    arguments = list(map(operands, group))
    copied = {problem.bytes: (_copy_operand(problem),) for problem in group}
    with ThreadPoolExecutor(COMPILE_THREADS) as pool:
        done = list(pool.map(compile_job, map(function, group), ours, arguments))
    compiled = dict(zip(ours, done, strict=True))
    for name, problem in zip(theirs, group, strict=True):
        compiled[name] = compile_job(_copy, name, copied[problem.bytes])
    jobs = [
        Job(name, run, KERNEL_PREFIX if on_gpu and name in ours else "")
        for pair in zip(ours, theirs, strict=True)
        for name in pair
        if (run := compiled[name].run) is not None
    ]
    timings = time_jobs(jobs, calls=calls, flush=flush, clocks=clocks)
    for problem, mine, base in zip(group, ours, theirs, strict=True):
        row: dict[str, Any] = {"table": "quantize", "kind": problem.kind}
        row |= {"m": problem.m, "n": problem.n, "k": 0, "compile_ms": round(compiled[mine].milliseconds, 1)}
        row |= figures(problem, timings.get(mine), compiled[mine].error)
        row["baseline"] = {"what": "copy of as many bytes, XLA"}
        row["baseline"] |= figures(problem, timings.get(base), compiled[base].error)
        yield row
