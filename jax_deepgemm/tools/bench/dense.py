"""The dense problems: FP8 and BF16 GEMMs of DeepSeek-V3's shapes, and the baselines measured beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepgemm.tools.bench.floors import SMALL_M
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
from jax_deepgemm.tools.bench.timing import READ_FLUSH_BYTES, Job, read_flusher, time_jobs

ROWS_OF_A = (1, 16, 64, 128, 256, 1024, 4096, 8192)
WEIGHTS = ((2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
SQUARES = (4096, 8192)
FP8_BASELINE_ROWS = 16  # a multiple of it for A: else XLA pads at each call, or converts to BF16 below
CUBLASLT_ONLY = {"xla_gpu_enable_triton_gemm": False}


@dataclass(frozen=True)
class Problem:
    """One row of a table: `kind` is "fp8", "fp8_wgrad" or "bf16"."""

    kind: str
    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.kind} m={self.m} n={self.n} k={self.k}"

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """Of A, B and D, and of C where there is one; scales not counted."""
        operand = 2 if self.kind == "bf16" else 1
        result = 8 if self.kind == "fp8_wgrad" else 2
        return operand * (self.m + self.n) * self.k + result * self.m * self.n


def tables() -> dict[str, list[Problem]]:
    """Returns the problems of each table, those with the same B side by side.

    >>> {name: len(rows) for name, rows in tables().items()}
    {'fp8': 58, 'fp8_wgrad': 7, 'bf16': 21}
    """
    fp8 = [Problem("fp8", m, n, k) for n, k in WEIGHTS for m in ROWS_OF_A]
    fp8 += [Problem("fp8", size, size, size) for size in SQUARES]
    wgrad = [Problem("fp8_wgrad", n, k, 4096) for n, k in WEIGHTS]
    bf16 = [Problem("bf16", m, n, k) for n, k in WEIGHTS for m in (1, 128, 4096)]
    return {"fp8": fp8, "fp8_wgrad": wgrad, "bf16": bf16}


def small_tables() -> dict[str, list[Problem]]:
    """Returns a few small problems, to try the machinery where there is no GPU."""
    return {kind: [Problem(kind, m, 256, 512) for m in (1, 64)] for kind in ("fp8", "fp8_wgrad", "bf16")}


def operands(problem: Problem) -> tuple[Any, ...]:
    """Draws A and B (standard normal) and C, quantised as the problem's kind asks."""
    import jax_deepgemm

    key_a, key_b = jax.random.split(jax.random.key(0))
    a = jax.random.normal(key_a, (problem.m, problem.k), jnp.bfloat16)
    b = jax.random.normal(key_b, (problem.n, problem.k), jnp.bfloat16)
    if problem.kind == "bf16":
        return a, b
    block = (1, 128) if problem.kind == "fp8_wgrad" else (128, 128)
    quantised = jax_deepgemm.quantize(a, block=(1, 128)), jax_deepgemm.quantize(b, block=block)
    if problem.kind == "fp8":
        return quantised
    return (*quantised, jnp.ones((problem.m, problem.n), jnp.float32))


@functools.partial(jax.jit, static_argnums=1)
def first_rows(operand: Any, rows: int) -> Any:
    """The first rows of A: one draw serves every m."""
    return jax.tree.map(lambda leaf: leaf[:rows], operand)


def product(problem: Problem) -> Callable[..., jax.Array]:
    """Returns this package's function for the problem."""
    import jax_deepgemm

    if problem.kind == "bf16":
        return jax_deepgemm.bf16_gemm_nt
    if problem.kind == "fp8_wgrad":
        return lambda a, b, c: jax_deepgemm.fp8_gemm_nt(a, b, c, out_dtype=jnp.float32)
    return jax_deepgemm.fp8_gemm_nt


def baseline(problem: Problem) -> Callable[..., jax.Array]:
    """Returns the same product as XLA has it (on a GPU by cuBLASLt); FP8 is multiplied without scales."""
    out = jnp.float32 if problem.kind == "fp8_wgrad" else jnp.bfloat16

    def dot(a: Any, b: Any, *_: Any) -> jax.Array:
        left, right = getattr(a, "values", a), getattr(b, "values", b)
        return lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=out)

    return dot


def compile_baseline(problem: Problem, name: str, arguments: tuple[Any, ...]) -> Compiled:
    """Compiles the baseline, for a GPU without XLA's own kernels of products."""
    options = CUBLASLT_ONLY if jax.default_backend() == "gpu" else None
    return compile_job(baseline(problem), name, arguments, options)


def measure(
    problems: Sequence[Problem], *, calls: int, flush: Callable[[], None], clocks: ClockLog | None
) -> Iterator[dict[str, Any]]:
    """Measures problems, those that can share operands in one profiler session; yields a row for each."""
    for (kind, *_), same_weights in groupby(problems, key=_shared_operands):
        group = list(same_weights)
        try:
            rows = max(map(_baseline_rows, group))
            drawn = operands(replace(group[0], m=rows) if kind != "fp8_wgrad" else group[0])
        except Exception as error:
            for problem in group:
                yield _row(problem) | {
                    "status": "failed",
                    "error": f"operands: {type(error).__name__}: {error}"[:400],
                }
            continue
        yield from _measure_group(group, drawn, calls=calls, flush=flush, clocks=clocks)


def _shared_operands(problem: Problem) -> tuple[Any, ...]:
    """Equal for problems that one draw serves: with the same B, and the same C where there is one."""
    return problem.kind, problem.n, problem.k, problem.m if problem.kind == "fp8_wgrad" else None


def _measure_group(
    group: Sequence[Problem],
    drawn: tuple[Any, ...],
    *,
    calls: int,
    flush: Callable[[], None],
    clocks: ClockLog | None,
) -> Iterator[dict[str, Any]]:
    on_gpu = jax.default_backend() == "gpu"
    arguments = [_with_rows(drawn, problem, problem.m) for problem in group]
    padded = [_with_rows(drawn, problem, _baseline_rows(problem)) for problem in group]
    ours, theirs = names("jdg_row", group), names("baseline_row", group)
    with ThreadPoolExecutor(COMPILE_THREADS) as pool:
        compiling = functools.partial(compile_job, carry=accumulator(group[0].kind))
        waiting = list(pool.map(compiling, map(product, group), ours, arguments))
    # One at a time, as XLA picks cuBLASLt's algorithm by timing it on the GPU.
    compiled = {
        name: compile_baseline(problem, name, given)
        for name, problem, given in zip(theirs, group, padded, strict=True)
    }
    compiled |= dict(zip(ours, waiting, strict=True))
    jobs = [
        Job(name, run, KERNEL_PREFIX if on_gpu and name in ours else "")
        for pair in zip(ours, theirs, strict=True)
        for name in pair
        if (run := compiled[name].run) is not None
    ]
    timings = time_jobs(jobs, calls=calls, flush=flush, clocks=clocks)
    small = {name for name, problem in zip(ours, group, strict=True) if _reads_weights(problem)}
    jobs = [job for job in jobs if job.name in small]
    after_read = time_jobs(jobs, calls=calls, flush=_read_flusher(), clocks=clocks) if jobs else {}
    for problem, mine, base in zip(group, ours, theirs, strict=True):
        row = _row(problem) | {"compile_ms": round(compiled[mine].milliseconds, 1)}
        row |= figures(problem, timings.get(mine), compiled[mine].error)
        if mine in small:
            row["read_flush"] = figures(problem, after_read.get(mine), compiled[mine].error)
        row["baseline"] = {"what": "cuBLASLt through jnp" if on_gpu else "XLA dot"}
        row["baseline"] |= figures(problem, timings.get(base), compiled[base].error)
        yield row


def _reads_weights(problem: Problem) -> bool:
    """Whether it is one of those that are also timed after a flush that leaves no dirty lines."""
    return problem.m <= SMALL_M and problem.kind in ("fp8", "bf16")


@functools.cache
def _read_flusher() -> Callable[[], None]:
    return read_flusher(READ_FLUSH_BYTES if jax.default_backend() == "gpu" else 1 << 20)


def _baseline_rows(problem: Problem) -> int:
    unit = FP8_BASELINE_ROWS if problem.kind == "fp8" else 1
    return -(-problem.m // unit) * unit


def _with_rows(drawn: tuple[Any, ...], problem: Problem, rows: int) -> tuple[Any, ...]:
    return drawn if problem.kind == "fp8_wgrad" else (first_rows(drawn[0], rows), *drawn[1:])


def _row(problem: Problem) -> dict[str, Any]:
    return {"table": problem.kind, "m": problem.m, "n": problem.n, "k": problem.k}


def control(
    size: int = 8192, *, calls: int, flush: Callable[[], None], clocks: ClockLog | None
) -> dict[str, Any]:
    """Measures a product that is not this package's, whose time says in which state the machine is."""
    problem = Problem("fp8", size, size, size)
    compiled = compile_baseline(problem, "control", operands(problem))
    timing = None
    if compiled.run is not None:
        job = Job("control", compiled.run)
        timing = time_jobs([job], calls=calls, flush=flush, clocks=clocks)["control"]
    about = {"what": f"cuBLASLt FP8 {size}^3 through jnp"}
    return about | figures(problem, timing, compiled.error)
