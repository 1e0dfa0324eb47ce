"""Back to back, as in training: the power cap decides, and ours and cuBLASLt's take turns under it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jax_deepgemm.tools.bench import dense
from jax_deepgemm.tools.bench.dense import Problem
from jax_deepgemm.tools.bench.machine import ClockLog
from jax_deepgemm.tools.bench.rows import Compiled, compile_job

TURNS = 2
SECONDS = 0.5  # a turn, on a GPU
WARM_UP = 16


def tables() -> dict[str, list[Problem]]:
    """Returns the problems of the one table.

    >>> list(map(str, tables()["sustained"]))
    ['fp8 m=8192 n=8192 k=8192']
    """
    return {"sustained": [Problem("fp8", 8192, 8192, 8192)]}


def small_tables() -> dict[str, list[Problem]]:
    """Returns a small problem, to try the machinery where there is no GPU."""
    return {"sustained": [Problem("fp8", 128, 256, 256)]}


def measure(
    problems: Sequence[Problem], *, calls: int, flush: Callable[[], None], clocks: ClockLog | None
) -> Iterator[dict[str, Any]]:
    """Measures each problem by the wall clock; calls and flush are those of other tables and not used."""
    for problem in problems:
        row = {"table": "sustained", "m": problem.m, "n": problem.n, "k": problem.k}
        try:
            drawn = dense.operands(problem)
            sides = (
                compile_job(dense.product(problem), "jdg_sustained", drawn),
                dense.compile_baseline(problem, "baseline_sustained", drawn),
            )
            ours, theirs = _turns(problem, sides, clocks)
        except Exception as error:
            yield row | {"status": "failed", "error": f"{type(error).__name__}: {error}"[:400]}
            continue
        compile_ms = round(sides[0].milliseconds, 1)
        yield row | {"compile_ms": compile_ms} | ours | {"baseline": theirs}


def _turns(
    problem: Problem, sides: Sequence[Compiled], clocks: ClockLog | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of both sides.

    Raises:
      RuntimeError: a side was not compiled.
    """
    seconds = SECONDS if jax.default_backend() == "gpu" else 0.02
    runs = []
    for side in sides:
        if side.run is None:
            raise RuntimeError(side.error)
        runs.append(side.run)
    counts = []
    for run in runs:
        _back_to_back(run, WARM_UP)
        begin, end = _back_to_back(run, WARM_UP)
        counts.append(max(1, round(seconds * WARM_UP / (end - begin))))
    spans: list[list[tuple[float, float]]] = [[], []]
    for turn in range(TURNS * len(runs)):
        side_now = turn % len(runs)
        spans[side_now].append(_back_to_back(runs[side_now], counts[side_now]))
    ours, theirs = (
        _figures(problem, taken, count, clocks) for taken, count in zip(spans, counts, strict=True)
    )
    return ours, theirs | {"what": "cuBLASLt through jnp"}


def _back_to_back(run: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Queues calls, waits once, and returns begin and end."""
    result = None
    begin = time.monotonic()
    for _ in range(calls):
        result = run()
    jax.block_until_ready(result)
    return begin, time.monotonic()


def _figures(
    problem: Problem, spans: Sequence[tuple[float, float]], calls: int, clocks: ClockLog | None
) -> dict[str, Any]:
    each = [(end - begin) * 1e6 / calls for begin, end in spans]
    mean = sum(each) / len(each)
    return {
        "status": "ok",
        "us": round(mean, 3),
        "us_min": round(min(each), 3),
        "us_max": round(max(each), 3),
        "calls": calls * len(spans),
        "tflops": round(problem.flops / mean / 1e6, 1),
        "gbytes_per_s": round(problem.bytes / mean / 1e3, 1),
        "seconds": [round(end - begin, 3) for begin, end in spans],
        "clock": clocks.during(spans) if clocks else {},
        "timed_by": "wall clock, back to back",
    }
