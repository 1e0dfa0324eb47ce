"""A whole op under jit: what runs beside the op's own kernel, alone and in the program that a model has.

The op alone must be one kernel: a GEMM's scales are read as they are stored, with no transpose in front.
"""

from __future__ import annotations

from typing import Any

from jax_deepgemm.core.bench import Row
from jax_deepgemm.tools.bench import machine
from jax_deepgemm.tools.bench.rows import figures
from jax_deepgemm.tools.bench.sides import Measuring, Side, beside, compiled, own, timed
from jax_deepgemm.tools.bench.timing import Job, Queued, time_queued

QUEUED_CALLS = 100


def measured(row: Row, drawn: Any, how: Measuring) -> dict[str, Any]:
    """Returns what a row and its whole program take, both in one profiler session, and calls queued.

    Raises:
      Exception: whatever the calls that are queued raise.
    """
    assert row.whole is not None
    about = beside(row.whole, drawn, "jdg_whole")
    sides = (own(row, drawn, "jdg_alone"), Side(about.name, about.function, about.arguments))
    programs = compiled(sides)
    timings = timed(sides, programs, how)
    alone, whole = (figures(row, timings.get(one.name), programs[one.name].error) for one in sides)
    run = programs[about.name].run
    if whole["status"] != "ok" or run is None:
        return whole
    queued = time_queued([Job(about.name, run)], QUEUED_CALLS if machine.on_gpu() else how.calls)[about.name]
    compile_ms = round(programs[sides[0].name].milliseconds, 1)
    return {"compile_ms": compile_ms} | judged(alone, whole, queued)


def judged(alone: dict[str, Any], whole: dict[str, Any], queued: Queued) -> dict[str, Any]:
    """Returns a row's figures; failed where the program of the op alone ran other kernels too."""
    found = alone | {"whole": whole, "wall_us": round(queued.wall, 3)}
    if queued.kernels is not None:
        found["idle_us"] = round(queued.wall - queued.kernels, 3)
    if alone["status"] == "ok":
        found["other_us"] = round(alone["all_us"] - alone["us"], 3)
        if found["other_us"]:
            own, others = f"{alone['us']:.1f} us", f"{found['other_us']:.1f} us"
            text = f"beside the GEMM's {own} its program ran {others} of others"
            found |= {"status": "failed", "error": text}
    return found
