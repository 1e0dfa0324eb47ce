"""Measures rows, whatever they compute: those of a session together, each in the way that it asks for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jax_deepgemm.core.bench import Row
from jax_deepgemm.tools.bench import machine, timeline, turns, whole
from jax_deepgemm.tools.bench.machine import ClockLog
from jax_deepgemm.tools.bench.rows import Compiled, figures, names
from jax_deepgemm.tools.bench.sides import (
    Measuring,
    baseline_alone,
    beside,
    compiled,
    failed,
    named,
    own,
    timed,
)
from jax_deepgemm.tools.bench.timing import READ_FLUSH_BYTES, Timing, read_flusher


def measure(
    rows: Sequence[Row], *, calls: int, flush: Callable[[], None], clocks: ClockLog | None
) -> Iterator[dict[str, Any]]:
    """Measures rows of a table, those that share a draw or a session together; yields a result for each.

    Args:
      calls: timed calls of each function.
      flush: empties the L2 cache.
      clocks: samples of the GPU's clock, taken meanwhile.
    """
    how = Measuring(calls, flush, clocks)
    sessions: dict[Any, list[Row]] = {}
    for row in rows:
        sessions.setdefault(row.draw if row.session is None else row.session, []).append(row)
    for session in sessions.values():
        try:
            drawn = {draw: draw() for draw in dict.fromkeys(row.draw for row in session)}
        except Exception as error:
            yield from (failed(row, error, "operands: ") for row in session)
            continue
        yield from _session(session, drawn, how)


def measure_baseline(
    row: Row, *, calls: int, flush: Callable[[], None], clocks: ClockLog | None
) -> dict[str, Any]:
    """Measures only what stands beside a row."""
    return baseline_alone(row, row.draw(), Measuring(calls, flush, clocks), calls)


def _session(session: Sequence[Row], drawn: Mapping[Any, Any], how: Measuring) -> Iterator[dict[str, Any]]:
    together = [row for row in session if not row.in_turns and row.whole is None]
    if together:
        yield from _kernels(together, drawn, how)
    for row in session:
        if row in together:
            continue
        try:
            way = turns.measured if row.in_turns else whole.measured
            yield {**row.fields, **way(row, drawn[row.draw], how)}
        except Exception as error:
            yield failed(row, error)


def _kernels(session: Sequence[Row], drawn: Mapping[Any, Any], how: Measuring) -> Iterator[dict[str, Any]]:
    """Each row and what stands beside it, one after the other in one profiler session."""
    ours, theirs = names("jdg_row", session), names("baseline_row", session)
    sides = []
    try:
        for row, mine, base in zip(session, ours, theirs, strict=True):
            sides.append(own(row, drawn[row.draw], mine))
            if row.baseline is not None and row.baseline.calls is None:
                sides.append(beside(row.baseline, drawn[row.draw], base))
    except Exception as error:
        yield from (failed(row, error, "operands: ") for row in session)
        return
    programs = compiled(sides)
    timings = timed(sides, programs, how)
    again = {name for name, row in zip(ours, session, strict=True) if row.read_flush}
    small = [side for side in sides if side.name in again]
    after_read = timed(small, programs, how, flush=_read_flusher()) if small else {}
    for row, mine, base in zip(session, ours, theirs, strict=True):
        program = programs[mine]
        found: dict[str, Any] = {**row.fields, "compile_ms": round(program.milliseconds, 1)}
        found |= with_gemms(figures(row, timings.get(mine), program.error), row.gemms) | held(row, program)
        if row.timeline:
            found |= timeline.kept(timings.get(mine))
        if row.read_flush:
            found["read_flush"] = figures(row, after_read.get(mine), program.error)
        if row.baseline is not None:
            found["baseline"] = _baseline(row, drawn[row.draw], programs.get(base), timings.get(base), how)
        yield found


def _baseline(
    row: Row, drawn: Any, program: Compiled | None, timing: Timing | None, how: Measuring
) -> dict[str, Any]:
    about = row.baseline
    assert about is not None
    if about.skipped:
        return named(about) | {"status": "skipped", "error": about.skipped}
    if program is None:
        return baseline_alone(row, drawn, how, about.calls or how.calls)
    compile_ms = {"compile_ms": round(program.milliseconds, 1)} if about.ours else {}
    return named(about) | compile_ms | figures(row, timing, program.error) | held(row, program)


def held(row: Row, program: Compiled) -> dict[str, Any]:
    """Bytes that the program of a whole layer holds beside operands and results, where that is known."""
    return {} if row.prefix or program.temporary is None else {"temp_bytes": program.temporary}


@functools.cache
def _read_flusher() -> Callable[[], None]:
    return read_flusher(READ_FLUSH_BYTES if machine.on_gpu() else 1 << 20)


def with_gemms(found: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Adds the time of the kernels whose names begin so, and of the rest, where there is a trace to tell.

    >>> with_gemms({"us": 8.0, "kernels": {"jdg_gemm": 6.0, "gather": 2.0}}, "jdg_")["rest_us"]
    2.0
    """
    if prefix and found.get("kernels"):
        gemms = sum(us for name, us in found["kernels"].items() if name.startswith(prefix))
        found |= {"gemm_us": round(gemms, 3), "rest_us": round(found["us"] - gemms, 3)}
    return found
