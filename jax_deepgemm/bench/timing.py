"""Times many compiled functions in one profiler session, the L2 cache flushed before every call."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.bench import trace
from jax_deepgemm.bench.machine import ClockLog
from jax_deepgemm.bench.trace import Measured

FLUSH_BYTES = 8 << 30
WARM_UP = 2


@dataclass(frozen=True)
class Job:
    """One function to time.

    Attributes:
      name: unique; the function was jitted under it (see `named`).
      run: calls the compiled function on its operands and returns its results.
      prefix: of the kernels that count; "" for all.
    """

    name: str
    run: Callable[[], Any]
    prefix: str = ""


@dataclass(frozen=True)
class Timing:
    """What came of a job: `measured`, or the reason why there is nothing."""

    measured: Measured | None
    clock: dict[str, float]
    method: str
    error: str = ""


def named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Returns the function under a name that its XLA module, and so its kernels in a trace, will carry."""

    def call(*args: Any) -> Any:
        return function(*args)

    call.__name__ = call.__qualname__ = name
    return call


def flusher(size: int = FLUSH_BYTES) -> Callable[[], None]:
    """Returns a function that writes a buffer of `size` bytes on the device, which empties the L2 cache.

    It also gives the GPU the pause under which isolated calls are measured: about 2.4 ms on an H200 for 8
    GiB.
    """

    def jdg_flush(buffer: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.broadcast_to(value, buffer.shape)

    fill = jax.jit(jdg_flush, donate_argnums=0, keep_unused=True)
    value = jnp.float32(1)
    held = [jnp.zeros((max(size >> 16, 1), 1 << 14), jnp.float32)]

    def flush() -> None:
        held[0] = fill(held[0], value)

    return flush


def time_jobs(
    jobs: Sequence[Job], *, calls: int = 12, flush: Callable[[], None], clocks: ClockLog | None = None
) -> dict[str, Timing]:
    """Times every job: warm-up calls, then `calls` calls in one profiler session.

    A job that raises is reported as failed, and the others go on. Where the trace holds no GPU the time is
    the wall clock's, per call, and says so in `method`.
    """
    failed: dict[str, str] = {}
    for job in jobs:
        try:
            for _ in range(WARM_UP):
                jax.block_until_ready(job.run())
        except Exception as error:
            failed[job.name] = _short(error)
    ready = [job for job in jobs if job.name not in failed]
    order: list[str] = []
    spans: dict[str, tuple[float, float]] = {}
    walls: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="jdg_trace_") as folder:
        with _profiler(folder):
            flush()
            for job in ready:
                begin = time.monotonic()
                try:
                    walls[job.name] = _run(job, calls, flush)
                    order += [job.name] * calls
                except Exception as error:
                    failed[job.name] = _short(error)
                spans[job.name] = (begin, time.monotonic())
        events = trace.read(folder)
    results: dict[str, Timing] = {}
    found, reason = _find(events, order)
    for job in jobs:
        clock = clocks.between(*spans[job.name]) if clocks and job.name in spans else {}
        if job.name in failed:
            results[job.name] = Timing(None, clock, "", failed[job.name])
        elif not events:
            wall = Measured(tuple(walls[job.name]), (), {})
            results[job.name] = Timing(wall, clock, "wall clock: the trace shows no GPU")
        else:
            results[job.name] = _timing(job, found.get(job.name, []), calls, clock, reason)
    return results


def _run(job: Job, calls: int, flush: Callable[[], None]) -> list[float]:
    """Queues the calls and waits once: on a GPU the flushes keep the queue ahead of the device."""
    gpu = jax.default_backend() == "gpu"
    walls, result = [], None
    for _ in range(calls):
        flush()
        begin = time.perf_counter()
        result = job.run()
        if not gpu:
            jax.block_until_ready(result)
        walls.append((time.perf_counter() - begin) * 1e6)
    jax.block_until_ready(result)
    return walls


def _find(
    events: Sequence[trace.Event], order: Sequence[str]
) -> tuple[dict[str, list[list[trace.Event]]], str]:
    try:
        return trace.split_calls(events, order), ""
    except ValueError as error:
        return {}, str(error)


def _timing(
    job: Job, found: list[list[trace.Event]], calls: int, clock: dict[str, float], reason: str
) -> Timing:
    try:
        if reason:
            raise ValueError(reason)
        if len(found) != calls:
            raise ValueError(f"the trace shows {len(found)} calls, but {calls} were made")
        return Timing(trace.measured(found, job.prefix), clock, "profiler")
    except ValueError as error:
        return Timing(None, clock, "", str(error))


@contextlib.contextmanager
def _profiler(folder: str) -> Any:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    with jax.profiler.trace(folder, profiler_options=options):
        yield


def _short(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else ''}"
