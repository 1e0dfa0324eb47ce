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

from jax_deepgemm.tools.bench import trace
from jax_deepgemm.tools.bench.machine import ClockLog
from jax_deepgemm.tools.bench.trace import Measured

FLUSH_BYTES = 8 << 30
READ_FLUSH_BYTES = 2 << 30
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


def read_flusher(size: int = READ_FLUSH_BYTES) -> Callable[[], None]:
    """Returns a function that reads `size` bytes: the L2 cache then holds those, and no dirty lines."""

    def jdg_flush(buffer: jax.Array) -> jax.Array:
        return jnp.sum(buffer, axis=1)

    read, held = jax.jit(jdg_flush), jnp.zeros((max(size >> 16, 1), 1 << 14), jnp.float32)

    def flush() -> None:
        read(held)

    return flush


def time_jobs(
    jobs: Sequence[Job], *, calls: int = 12, flush: Callable[[], None], clocks: ClockLog | None = None
) -> dict[str, Timing]:
    """Times every job: warm-up calls, then `calls` calls in one profiler session.

    A job that raises is reported as failed, and the others go on. Where the trace holds no GPU the time is
    the wall clock's, per call, and says so in `method`.
    """
    failed: dict[str, str] = {}
    spans: dict[str, tuple[float, float]] = {}
    order: list[str] = []
    _each(jobs, failed, lambda job: [jax.block_until_ready(job.run()) for _ in range(WARM_UP)])

    def queue(job: Job) -> None:
        begin = time.monotonic()
        try:
            _queue_calls(job, calls, flush)
            order.extend([job.name] * calls)
        finally:
            spans[job.name] = (begin, time.monotonic())

    with tempfile.TemporaryDirectory(prefix="jdg_trace_") as folder:
        with profiler(folder):
            flush()
            _each(jobs, failed, queue)
        events = trace.read(folder)
    found, reason = _find(events, order)
    results: dict[str, Timing] = {}

    def collect(job: Job) -> None:
        clock = clocks.between(*spans[job.name]) if clocks else {}
        if events:
            results[job.name] = _timing(job, found.get(job.name, []), calls, clock, reason)
        else:
            wall = Measured(tuple(_wall_clock(job, calls, flush)), (), {})
            results[job.name] = Timing(wall, clock, "wall clock: the trace shows no GPU")

    _each(jobs, failed, collect)
    for name, error in failed.items():
        results[name] = Timing(None, {}, "", error)
    return results


@dataclass(frozen=True)
class Queued:
    """Microseconds per call of calls queued one after the other.

    Attributes:
      wall: from the first call until the last has ended.
      kernels: all that ran on the device, or None where the trace shows no GPU.
    """

    wall: float
    kernels: float | None


def time_queued(jobs: Sequence[Job], calls: int) -> dict[str, Queued]:
    """Times jobs without flush or wait between calls: first by the wall clock, then from a trace.

    Raises:
      Exception: whatever a job raises.
    """
    wall = {}
    for job in jobs:
        _queue_calls(job, WARM_UP, lambda: None)
        begin = time.perf_counter()
        _queue_calls(job, calls, lambda: None)
        wall[job.name] = (time.perf_counter() - begin) * 1e6 / calls
    with tempfile.TemporaryDirectory(prefix="jdg_trace_") as folder:
        with profiler(folder):
            for job in jobs:
                _queue_calls(job, calls, lambda: None)
        busy = trace.busy(trace.read(folder))
    kernels = {name: microseconds / calls for name, microseconds in busy.items()}
    return {name: Queued(each, kernels.get(name)) for name, each in wall.items()}


def _each(jobs: Sequence[Job], failed: dict[str, str], action: Callable[[Job], Any]) -> None:
    """Runs an action for every job that has not failed yet, and records those that fail."""
    for job in jobs:
        if job.name in failed:
            continue
        try:
            action(job)
        except Exception as error:  # a row must not end the run
            text = str(error).strip().splitlines() or [""]
            failed[job.name] = f"{type(error).__name__}: {text[0][:300]}"


def _queue_calls(job: Job, calls: int, flush: Callable[[], None]) -> None:
    """Waits once for all: the flushes keep the queue ahead of the device, which never waits for the host."""
    result = None
    for _ in range(calls):
        flush()
        result = job.run()
    jax.block_until_ready(result)


def _wall_clock(job: Job, calls: int, flush: Callable[[], None]) -> list[float]:
    times = []
    for _ in range(calls):
        flush()
        begin = time.perf_counter()
        jax.block_until_ready(job.run())
        times.append((time.perf_counter() - begin) * 1e6)
    return times


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
def profiler(folder: str) -> Any:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    options.enable_hlo_proto = False
    with jax.profiler.trace(folder, profiler_options=options):
        yield
