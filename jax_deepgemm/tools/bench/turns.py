"""Back to back, as in training: the power cap decides, and a row and its baseline take turns under it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jax_deepgemm.core.bench import Row
from jax_deepgemm.tools.bench import machine
from jax_deepgemm.tools.bench.rows import Compiled
from jax_deepgemm.tools.bench.sides import Measuring, beside, named, own

TURNS = 2
SECONDS = 0.5  # a turn, on a GPU
WARM_UP = 16


def measured(row: Row, drawn: Any, how: Measuring) -> dict[str, Any]:
    """Returns what a row and its baseline take by the wall clock; calls and flush are not used.

    Raises:
      RuntimeError: one of them was not compiled.
    """
    assert row.baseline is not None, f"{row}: a row that is measured in turns has a baseline"
    ours = own(row, drawn, "jdg_sustained").compile()
    theirs = beside(row.baseline, drawn, "baseline_sustained").compile()
    mine, base = _turns(row, (ours, theirs), how)
    compile_ms = round(ours.milliseconds, 1)
    return {"compile_ms": compile_ms} | mine | {"baseline": base | named(row.baseline)}


def _turns(row: Row, sides: Sequence[Compiled], how: Measuring) -> list[dict[str, Any]]:
    """The figures of each side.

    Raises:
      RuntimeError: a side was not compiled.
    """
    seconds = SECONDS if machine.on_gpu() else 0.02
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
    return [_figures(row, taken, count, how) for taken, count in zip(spans, counts, strict=True)]


def _back_to_back(run: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Queues calls, waits once, and returns begin and end."""
    result = None
    begin = time.monotonic()
    for _ in range(calls):
        result = run()
    jax.block_until_ready(result)
    return begin, time.monotonic()


def _figures(row: Row, spans: Sequence[tuple[float, float]], calls: int, how: Measuring) -> dict[str, Any]:
    each = [(end - begin) * 1e6 / calls for begin, end in spans]
    mean = sum(each) / len(each)
    return {
        "status": "ok",
        "us": round(mean, 3),
        "us_min": round(min(each), 3),
        "us_max": round(max(each), 3),
        "calls": calls * len(spans),
        "tflops": round(row.flops / mean / 1e6, 1),
        "gbytes_per_s": round(row.bytes / mean / 1e3, 1),
        "seconds": [round(end - begin, 3) for begin, end in spans],
        "clock": how.clocks.during(spans) if how.clocks else {},
        "timed_by": "wall clock, back to back",
    }
