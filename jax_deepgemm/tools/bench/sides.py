"""The functions of a session: each row's own, and those beside it; how they are compiled and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax

from jax_deepgemm.core.bench import KERNEL_PREFIX, Beside, Row
from jax_deepgemm.tools.bench import machine
from jax_deepgemm.tools.bench.machine import ClockLog
from jax_deepgemm.tools.bench.rows import COMPILE_THREADS, Compiled, compile_job, figures
from jax_deepgemm.tools.bench.timing import Job, Timing, time_jobs


@dataclass(frozen=True)
class Measuring:
    """How everything is measured.

    Attributes:
      calls: timed calls of each function.
      flush: empties the L2 cache.
      clocks: samples of the GPU's clock, taken meanwhile.
    """

    calls: int
    flush: Callable[[], None]
    clocks: ClockLog | None


@dataclass(frozen=True, eq=False)
class Side:
    """A function to compile under a name, and the arguments that it is bound to.

    Attributes:
      prefix: of the kernels that count; "" for all.
      ours: whether it is compiled while others are. XLA picks cuBLASLt's algorithms by timing them on the
        GPU, so functions that are not this package's are compiled one by one.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    prefix: str = ""
    carry: int | None = None
    options: Mapping[str, Any] | None = None
    ours: bool = True

    def compile(self) -> Compiled:
        """Compiles it; an error is kept."""
        options = dict(self.options) if self.options and machine.on_gpu() else None
        return compile_job(self.function, self.name, self.arguments, options, carry=self.carry)


def own(row: Row, drawn: Any, name: str) -> Side:
    """A row's function."""
    arguments = (*row.operands(drawn), *map(jax.numpy.asarray, row.constants))
    return Side(name, row.function, arguments, row.prefix, row.carry)


def beside(about: Beside, drawn: Any, name: str) -> Side:
    """A function beside a row's."""
    arguments = (*about.operands(drawn), *map(jax.numpy.asarray, about.constants))
    prefix = KERNEL_PREFIX if about.ours else ""
    return Side(name, about.function, arguments, prefix, None, about.options, about.ours)


def compiled(sides: Iterable[Side]) -> dict[str, Compiled]:
    """Compiles functions; returns the programs by name."""
    sides = list(sides)
    with ThreadPoolExecutor(COMPILE_THREADS) as pool:
        waiting = {side.name: pool.submit(side.compile) for side in sides if side.ours}
        found = {name: program.result() for name, program in waiting.items()}
    return found | {side.name: side.compile() for side in sides if not side.ours}


def timed(
    sides: Iterable[Side],
    programs: Mapping[str, Compiled],
    how: Measuring,
    calls: int | None = None,
    flush: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Times what was compiled in one profiler session, with other calls or another flush if given."""
    jobs = [
        Job(side.name, run, side.prefix if machine.on_gpu() else "")
        for side in sides
        if (run := programs[side.name].run) is not None
    ]
    if not jobs:
        return {}
    return time_jobs(jobs, calls=calls or how.calls, flush=flush or how.flush, clocks=how.clocks)


def baseline_alone(row: Row, drawn: Any, how: Measuring, calls: int) -> dict[str, Any]:
    """Measures what stands beside a row in a session of its own."""
    assert row.baseline is not None
    side = beside(row.baseline, drawn, "baseline_alone")
    programs = compiled([side])
    timings = timed([side], programs, how, calls=calls)
    return named(row.baseline) | figures(row, timings.get(side.name), programs[side.name].error)


def named(about: Beside) -> dict[str, Any]:
    """What a result says of a function beside a row's, but for figures."""
    return {**about.fields, "what": about.what if machine.on_gpu() else about.elsewhere or about.what}


def failed(row: Row, error: Exception, step: str = "") -> dict[str, Any]:
    """The result of a row that could not be measured."""
    return {**row.fields, "status": "failed", "error": f"{step}{type(error).__name__}: {error}"[:400]}
