"""Device time of kernels, read from a JAX profiler trace.

XLA's GPU profiler records every kernel with its start and duration (CUPTI activity records) on the plane
`/device:GPU:0`, one line per stream. Each record carries the name of the XLA module that launched it, which
is how kernels find their call: every measured function is jitted under a name of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLUSH = "jdg_flush"


@dataclass(frozen=True)
class Event:
    """One piece of work on the device.

    Attributes:
      name: the kernel's name.
      start: nanoseconds since the trace began.
      duration: nanoseconds.
      module: the XLA module that launched it, or "" where the trace does not say.
    """

    name: str
    start: float
    duration: float
    module: str = ""


@dataclass(frozen=True)
class Measured:
    """Device time of one function, per call.

    Attributes:
      microseconds: of each call: as long as one of the kernels that count runs.
      kernels: their names, in order of first launch.
      by_kernel: median microseconds per call of each of them.
      everything: microseconds of each call with all that ran, such as copies and padding before the kernel.
      calls: the events of each call that count; none where there was no trace.
    """

    microseconds: tuple[float, ...]
    kernels: tuple[str, ...]
    by_kernel: dict[str, float]
    everything: tuple[float, ...] = ()
    calls: tuple[tuple[Event, ...], ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.microseconds)

    @property
    def median_of_everything(self) -> float:
        return statistics.median(self.everything or self.microseconds)

    @property
    def span(self) -> float | None:
        """Median microseconds from the first start to the last end: what idles between kernels counts too."""
        return statistics.median(map(span_of, self.calls)) if self.calls else None

    @property
    def launches(self) -> int | None:
        """Median number of what ran: kernels, copies and fills."""
        return statistics.median_high(map(len, self.calls)) if self.calls else None

    def typical(self) -> tuple[Event, ...]:
        """The call with the median span, its events by start; none where there was no trace."""
        by_span = sorted(self.calls, key=span_of)
        return by_span[len(by_span) // 2] if by_span else ()


def span_of(call: Sequence[Event]) -> float:
    """Microseconds from the first start to the last end.

    >>> span_of([Event("a", 1000.0, 9000.0), Event("b", 2000.0, 3000.0)])
    9.0
    """
    return (max(e.start + e.duration for e in call) - min(e.start for e in call)) / 1e3


def device_events(profile: Any, device: int = 0) -> list[Event]:
    """Returns what ran on one GPU, by default the first, of a `jax.profiler.ProfileData`, by start."""
    events = []
    for plane in profile.planes:
        if plane.name.split(" ")[0] != f"/device:GPU:{device}":
            continue
        lines = list(plane.lines)
        streams = [line for line in lines if line.name.startswith("Stream")]
        for line in streams or lines:
            events += [_event(event) for event in line.events]
    return sorted(events, key=lambda event: event.start)


def _event(event: Any) -> Event:
    stats = {name: value for name, value in event.stats if name is not None}
    return Event(event.name, event.start_ns, event.duration_ns, str(stats.get("hlo_module", "")))


def read(folder: str | Path, device: int = 0) -> list[Event]:
    """Returns the events of a GPU of the newest trace under `folder`; none if that is not in it."""
    from jax.profiler import ProfileData

    files = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return device_events(ProfileData.from_file(str(files[-1])), device) if files else []


def split_calls(events: Sequence[Event], order: Sequence[str]) -> dict[str, list[list[Event]]]:
    """Finds the events of each call.

    The calls ran one after the other on one stream, a flush of the L2 cache before each, so a flush begins a
    call. Where the events of a call name their module, that says whose call it is; where they do not, the
    order does.

    Args:
      events: of the whole trace, by start; the first is a flush.
      order: names of the functions, one entry per call.

    Returns:
      for each name its calls, each a list of events.

    Raises:
      ValueError: events that do not say their module, and another number of calls than were made.
    """
    groups = [group for group in _between_flushes(events) if group]
    owners = [next((name for name in map(_function, group) if name in order), "") for group in groups]
    if not all(owners):
        if len(groups) != len(order):
            raise ValueError(
                f"the trace shows {len(groups)} calls between flushes, but {len(order)} were made"
            )
        owners = list(order)
    calls: dict[str, list[list[Event]]] = {}
    for owner, group in zip(owners, groups, strict=True):
        own = [event for event in group if not event.module or _function(event) == owner]
        calls.setdefault(owner, []).append(own)
    return calls


def busy(events: Iterable[Event]) -> dict[str, float]:
    """Returns the microseconds of all that each jitted function ran, all its calls together."""
    found: dict[str, float] = {}
    for event in events:
        name = _function(event)
        found[name] = found.get(name, 0.0) + event.duration / 1e3
    return found


def _function(event: Event) -> str:
    """The jitted function's name: that of `jit_case_3(17)` and of `jit_case_3` is `case_3`."""
    return event.module.split("(")[0].removeprefix("jit_")


def _between_flushes(events: Sequence[Event]) -> list[list[Event]]:
    named = {event.name for event in events if _function(event) == FLUSH}
    flushes = named or {event.name for event in events[:1]}
    groups: list[list[Event]] = []
    for event in events:
        if event.name in flushes and _function(event) in (FLUSH, ""):
            groups.append([])
        elif groups:
            groups[-1].append(event)
    return groups


def covered(call: Sequence[Event]) -> float:
    """Microseconds in which at least one of a call's events ran: what overlaps counts once, as where a kernel
    is launched early and waits for the end of the one before it.

    >>> covered([Event("a", 0, 5000), Event("b", 2000, 4000), Event("c", 9000, 1000)])
    7.0
    """
    total, end = 0.0, float("-inf")
    for event in sorted(call, key=lambda event: event.start):
        stop = event.start + event.duration
        total += max(0.0, stop - max(event.start, end))
        end = max(end, stop)
    return total / 1e3


def measured(calls: Iterable[Sequence[Event]], prefix: str = "") -> Measured:
    """What the calls of one function took.

    Args:
      calls: the events of each call.
      prefix: only kernels whose names start so; "" for everything.

    Raises:
      ValueError: no call, or a call without such a kernel.
    """
    times: list[float] = []
    everything: list[float] = []
    counted: list[tuple[Event, ...]] = []
    by_kernel: dict[str, list[float]] = {}
    for call in calls:
        chosen = [event for event in call if event.name.startswith(prefix)]
        if not chosen:
            raise ValueError(f"no kernel named {prefix}* among {sorted({event.name for event in call})}")
        counted.append(tuple(chosen))
        times.append(covered(chosen))
        everything.append(covered(call))
        per_call: dict[str, float] = {}
        for event in chosen:
            per_call[event.name] = per_call.get(event.name, 0.0) + event.duration / 1e3
        for name, duration in per_call.items():
            by_kernel.setdefault(name, []).append(duration)
    if not times:
        raise ValueError("the trace shows no call of this function")
    medians = {name: statistics.median(durations) for name, durations in by_kernel.items()}
    return Measured(tuple(times), tuple(by_kernel), medians, tuple(everything), tuple(counted))
