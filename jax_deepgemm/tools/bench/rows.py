"""What every table's rows are made with: a compiled function under a name of its own, and its figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core.bench import Row
from jax_deepgemm.tools.bench.timing import Timing, named

COMPILE_THREADS = 8


class Accumulator:
    """A copy of an array, or of a tree of them, which functions update in place one after the other.

    There is one, however many the functions are: it is made when the first is called, and made anew after a
    call that failed.
    """

    def __init__(self, original: Any) -> None:
        self._original = original
        self._held: Any = None

    def update(self, function: Callable[[Any], Any]) -> Any:
        """Calls a function that its argument is donated to; the result takes its place."""
        held, self._held = self._held, None
        if held is None or _failed(held):
            held = jax.tree.map(jnp.copy, self._original)
        self._held = function(held)
        return self._held


def _failed(result: Any) -> bool:
    """Whether the call behind a result is known to have failed; does not wait for it."""
    try:
        for leaf in jax.tree.leaves(result):
            if leaf.is_ready():
                leaf.block_until_ready()
    except Exception:
        return True
    return False


@dataclass
class Compiled:
    """A compiled function bound to its arguments, or the reason why there is none.

    Attributes:
      temporary: bytes that it holds while it runs, beside operands and results; None: not known.
    """

    run: Callable[[], Any] | None
    milliseconds: float
    error: str = ""
    temporary: int | None = None


def compile_job(
    function: Callable[..., Any],
    name: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any] | None = None,
    *,
    carry: int | None = None,
    held: Accumulator | None = None,
) -> Compiled:
    """Compiles a function under a name; an error is kept, not raised, so that the other rows go on.

    The argument at `carry` is donated, and the result takes its place in the next call: an accumulator that
    is updated in place, with no copy between the flush and the kernel. It is a copy of what is given, or the
    one that is `held` for several functions.
    """
    begin = time.perf_counter()
    donated = () if carry is None else (carry,)
    try:
        jitted = jax.jit(named(function, name), donate_argnums=donated)
        compiled = jitted.lower(*arguments).compile(compiler_options=options)
    except Exception as error:
        text = str(error).strip() or repr(error)
        return Compiled(None, (time.perf_counter() - begin) * 1e3, f"{type(error).__name__}: {text[:300]}")
    milliseconds = (time.perf_counter() - begin) * 1e3
    temporary = _temporary(compiled)
    if carry is None:
        return Compiled(lambda: compiled(*arguments), milliseconds, temporary=temporary)
    place = held or Accumulator(arguments[carry])
    before, behind = arguments[:carry], arguments[carry + 1 :]
    update = lambda: place.update(lambda c: compiled(*before, c, *behind))  # noqa: E731
    return Compiled(update, milliseconds, temporary=temporary)


def _temporary(compiled: Any) -> int | None:
    """Bytes of temporary buffers, which not every backend tells."""
    found = getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)
    return None if found is None else int(found)


def names(stem: str, group: Sequence[Any]) -> list[str]:
    """A name for each row measured in one profiler session."""
    return [f"{stem}_{index}" for index in range(len(group))]


def figures(row: Row, timing: Timing | None, compile_error: str) -> dict[str, Any]:
    """The part of a row that was measured.

    Of what runs several kernels it says what they took from the first start to the last end, and how many
    they were.
    """
    if timing is None or timing.measured is None:
        return {"status": "failed", "error": compile_error or (timing.error if timing else "not measured")}
    measured = timing.measured
    median, span = measured.median, measured.span
    several = {"span_us": round(span, 3), "launches": measured.launches} if span and not row.prefix else {}
    return {
        "status": "ok",
        "us": round(median, 3),
        "us_min": round(min(measured.microseconds), 3),
        "us_max": round(max(measured.microseconds), 3),
        "all_us": round(measured.median_of_everything, 3),
        **several,
        "calls": len(measured.microseconds),
        "tflops": round(row.flops / median / 1e6, 1),
        "gbytes_per_s": round(row.bytes / median / 1e3, 1),
        "kernels": {name: round(duration, 3) for name, duration in measured.by_kernel.items()},
        "clock": timing.clock,
        "timed_by": timing.method,
    }
