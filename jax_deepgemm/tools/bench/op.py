"""A whole op under jit: what runs beside the GEMM, with A quantised before and in the same program.

The GEMM alone must be one kernel: its scales are read as they are stored, with no transpose in front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.tools.bench.dense import Problem
from jax_deepgemm.tools.bench.machine import ClockLog
from jax_deepgemm.tools.bench.rows import COMPILE_THREADS, GEMM_PREFIX, Compiled, compile_job, figures, names
from jax_deepgemm.tools.bench.timing import Job, Queued, time_jobs, time_queued

SHAPES = (
    (64, 7168, 2048),
    (128, 4096, 7168),
    (256, 2112, 7168),
    (1024, 24576, 1536),
    (4096, 4096, 7168),
    (4096, 7168, 16384),
)
QUEUED_CALLS = 100


def tables() -> dict[str, list[Problem]]:
    """Returns the problems of the one table.

    >>> len(tables()["op"])
    6
    """
    return {"op": [Problem("fp8", *shape) for shape in SHAPES]}


def small_tables() -> dict[str, list[Problem]]:
    """Returns a small problem, to try the machinery where there is no GPU."""
    return {"op": [Problem("fp8", 64, 256, 512)]}


def operands(problem: Problem) -> tuple[jax.Array, Any, Any]:
    """Draws x in bfloat16, A quantised from it, and B."""
    import jax_deepgemm

    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (problem.m, problem.k), jnp.bfloat16)
    w = jax.random.normal(keys[1], (problem.n, problem.k), jnp.bfloat16)
    return x, jax_deepgemm.quantize(x), jax_deepgemm.quantize(w, block=(128, 128))


def whole(x: jax.Array, b: Any) -> jax.Array:
    """The op as a model has it: x in bfloat16, weights quantised before."""
    import jax_deepgemm

    return jax_deepgemm.fp8_gemm_nt(jax_deepgemm.quantize(x), b)


def measure(
    problems: Sequence[Problem], *, calls: int, flush: Callable[[], None], clocks: ClockLog | None
) -> Iterator[dict[str, Any]]:
    """Measures each problem, the GEMM and the whole op in one profiler session; yields a row for each."""
    import jax_deepgemm

    alone, wholes = names("jdg_gemm", problems), names("jdg_op", problems)
    for problem, gemm, op in zip(problems, alone, wholes, strict=True):
        row = {"table": "op", "m": problem.m, "n": problem.n, "k": problem.k}
        try:
            x, a, b = operands(problem)
            work = [(jax_deepgemm.fp8_gemm_nt, gemm, (a, b)), (whole, op, (x, b))]
            with ThreadPoolExecutor(COMPILE_THREADS) as pool:
                compiled = list(pool.map(lambda each: compile_job(*each), work))
            yield row | _measured(problem, compiled, (gemm, op), calls, flush, clocks)
        except Exception as error:
            yield row | {"status": "failed", "error": f"{type(error).__name__}: {error}"[:400]}


def _measured(
    problem: Problem,
    compiled: Sequence[Compiled],
    called: Sequence[str],
    calls: int,
    flush: Callable[[], None],
    clocks: ClockLog | None,
) -> dict[str, Any]:
    on_gpu = jax.default_backend() == "gpu"
    prefixes = (GEMM_PREFIX if on_gpu else "", "")
    jobs = [
        Job(name, each.run, prefix)
        for name, each, prefix in zip(called, compiled, prefixes, strict=True)
        if each.run is not None
    ]
    timings = time_jobs(jobs, calls=calls, flush=flush, clocks=clocks)
    gemm, op = (
        figures(problem, timings.get(name), each.error) for name, each in zip(called, compiled, strict=True)
    )
    if op["status"] != "ok":
        return op
    queued = time_queued([job for job in jobs if job.name == called[1]], QUEUED_CALLS if on_gpu else calls)
    return {"compile_ms": round(compiled[0].milliseconds, 1)} | judged(gemm, op, queued[called[1]])


def judged(gemm: dict[str, Any], op: dict[str, Any], queued: Queued) -> dict[str, Any]:
    """Returns a row's figures; failed where the program of the GEMM alone ran other kernels too."""
    found = gemm | {"whole": op, "wall_us": round(queued.wall, 3)}
    if queued.kernels is not None:
        found["idle_us"] = round(queued.wall - queued.kernels, 3)
    if gemm["status"] == "ok":
        found["other_us"] = round(gemm["all_us"] - gemm["us"], 3)
        if found["other_us"]:
            text = (
                f"beside the GEMM's {gemm['us']:.1f} us its program ran {found['other_us']:.1f} us of others"
            )
            found |= {"status": "failed", "error": text}
    return found
