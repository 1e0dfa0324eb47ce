"""Times every candidate configuration of GEMM problems on the GPU that is here, and keeps the best."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jax_deepgemm import config as settings
from jax_deepgemm.core.bench import KERNEL_PREFIX
from jax_deepgemm.core.chip import Chip, chip_of
from jax_deepgemm.core.tuning import Entry, as_fields, device_key, problem_key, read, trying, write
from jax_deepgemm.jit.cache import locked
from jax_deepgemm.tools.bench.products import Work, drawn
from jax_deepgemm.tools.bench.rows import COMPILE_THREADS, Accumulator, Compiled, compile_job
from jax_deepgemm.tools.bench.timing import Job, flusher, time_jobs
from jax_deepgemm.tools.explain import problems
from jax_deepgemm.tools.registry import capabilities, families, family_of
from jax_deepgemm.tools.text import Progress

SESSION_JOBS = 256  # timed in one profiler session, more if one problem has more
SESSION_BYTES = 8 << 30  # of operands held at a time


@dataclass(frozen=True)
class Outcome:
    """What came of one problem.

    Attributes:
      device, problem: its keys in a tuning file.
      entry: what to write there; None if no candidate could be measured.
      measured: (configuration, microseconds), the fastest first.
      failed: (configuration or step, error) of what could not be measured.
    """

    device: str
    problem: str
    entry: Entry | None = None
    measured: list[tuple[Any, float]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Task:
    work: Work
    problem: Any
    chip: Chip
    configs: list[Any]

    @functools.cached_property
    def bytes(self) -> int:
        """Of the operands, and of the copy that is updated in place."""
        operands, carry = self.work.operands, self.work.carry
        copied = () if carry is None else operands[carry]
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((operands, copied)))

    def accumulator(self, operands: tuple[Any, ...]) -> Accumulator | None:
        """The one that all candidates update."""
        return None if self.work.carry is None else Accumulator(operands[self.work.carry])


def tune(
    items: Iterable[Work | tuple[Any, ...]],
    *,
    out: Path | None = None,
    calls: int = 12,
    time_limit: float = 900,
) -> list[Outcome]:
    """Measures every candidate of some products, and writes the fastest of each into a tuning file.

    What the file holds of other problems stays, also what other processes write meanwhile. It is written
    after each problem.

    Args:
      items: each a `Work`, or a tuple (function, *operands) of what it is made of.
      out: the file, by default the one that is in force for the GPU here (`config.tuning_file`).
      calls: timed calls of each candidate.
      time_limit: seconds after which no new profiler session starts.

    Returns:
      an outcome for each problem that was measured.

    Raises:
      ValueError: no GPU with kernels, no place to write, or a function that calls no GEMM, or several.
      OSError: the file cannot be read or written.
    """
    works = [one if isinstance(one, Work) else Work(str(one[0]), one[0], one[1:]) for one in items]
    chip = chip_here()
    path = out or file_of(chip)
    if path.exists():
        read(path)  # one that is damaged is found before anything is measured
    outcomes = []
    deadline = time.monotonic() + time_limit
    with Progress(len(works), "tune") as progress:
        for one in sweep(works, chip, calls=calls, flush=flusher(), deadline=deadline):
            outcomes.append(one)
            progress.step(one.problem)
            if one.entry is not None:
                keep(path, one.device, one.problem, one.entry)
    return outcomes


def keep(path: Path, device: str, problem: str, entry: Entry) -> None:
    """Puts an entry into a tuning file that other processes may write too."""
    with locked(path.with_name(f".{path.name}.lock")):
        known = read(path) if path.exists() else {}
        known.setdefault(device, {})[problem] = as_fields(entry)
        write(path, known)


def chip_here() -> Chip:
    """Returns the GPU that JAX computes on.

    Raises:
      ValueError: it has no kernels.
    """
    device = jax.devices()[0]
    if not any(family.runs_on(getattr(device, "compute_capability", "")) for family in families()):
        known = " or ".join(capabilities())
        raise ValueError(
            f"{device.device_kind} has no kernels to measure, need a GPU of compute capability {known}."
        )
    return chip_of(device)


def file_of(chip: Chip) -> Path:
    """Returns the tuning file in force for a GPU.

    Raises:
      ValueError: it is switched off.
    """
    path = settings.tuning_file(chip.name)
    if path is None:
        raise ValueError(f"{settings.TUNING_FILE} is off: name a file to write, or unset it.")
    return path


def sweep(
    works: Iterable[Work],
    chip: Chip,
    *,
    calls: int,
    flush: Callable[[], None],
    deadline: float = float("inf"),
) -> Iterator[Outcome]:
    """Times every candidate of every product, and yields an outcome for each problem.

    All candidates of a problem are timed in one profiler session, the L2 cache flushed before each call.
    Products that make the same problem are measured once. No session starts after `deadline`, in
    `time.monotonic()`.

    Raises:
      ValueError: a function that calls no GEMM, or several.
    """
    for session in _sessions(_tasks(works, chip)):
        if time.monotonic() > deadline:
            return
        yield from _measure(session, calls, flush)


def _tasks(works: Iterable[Work], chip: Chip) -> list[_Task]:
    found: dict[tuple[str, str], _Task] = {}
    for work in works:
        inside = problems(work.function, *work.operands, chip=chip)
        if len(inside) != 1:
            raise ValueError(f"{work.name}: calls {len(inside)} GEMMs of this package, need one to tune.")
        [(problem, usable)] = inside
        family = family_of(problem)
        assert family is not None
        configs = [config for config, _ in family.ranked(problem, usable)]
        found.setdefault((device_key(usable), problem_key(problem)), _Task(work, problem, usable, configs))
    return list(found.values())


def _sessions(tasks: Sequence[_Task]) -> Iterator[list[_Task]]:
    """Consecutive problems, as many as one session takes."""
    session: list[_Task] = []
    for task in tasks:
        jobs = sum(len(one.configs) for one in [*session, task])
        size = sum(one.bytes for one in [*session, task])
        if session and (jobs > SESSION_JOBS or size > SESSION_BYTES):
            yield session
            session = []
        session.append(task)
    if session:
        yield session


def _measure(session: Sequence[_Task], calls: int, flush: Callable[[], None]) -> Iterator[Outcome]:
    try:
        operands = drawn([task.work.operands for task in session])
    except Exception as error:  # too large for the device: the other sessions go on
        failed = [("operands", f"{type(error).__name__}: {error}"[:300])]
        yield from (Outcome(*_keys(task), failed=failed) for task in session)
        return
    pairs = [(i, config) for i, task in enumerate(session) for config in task.configs]
    names = [f"jdg_tune_{index}" for index in range(len(pairs))]
    held = [task.accumulator(given) for task, given in zip(session, operands, strict=True)]

    def compiled(name: str, pair: tuple[int, Any]) -> Compiled:
        i, config = pair
        work = session[i].work
        with trying(session[i].problem, config):
            return compile_job(work.function, name, operands[i], carry=work.carry, held=held[i])

    with ThreadPoolExecutor(COMPILE_THREADS) as pool:
        programs = list(pool.map(compiled, names, pairs))
    jobs = [Job(name, one.run, KERNEL_PREFIX) for name, one in zip(names, programs, strict=True) if one.run]
    timings = time_jobs(jobs, calls=calls, flush=flush)
    for i, task in enumerate(session):
        measured, failed = [], []
        for name, (owner, config), program in zip(names, pairs, programs, strict=True):
            if owner != i:
                continue
            timing = timings.get(name)
            if timing is not None and timing.measured is not None:
                measured.append((config, round(timing.measured.median, 3)))
            else:
                failed.append((str(config), program.error or (timing.error if timing else "not measured")))
        yield _outcome(task, sorted(measured, key=lambda pair: pair[1]), failed)


def _outcome(task: _Task, measured: list[tuple[Any, float]], failed: list[tuple[str, str]]) -> Outcome:
    if not measured:
        return Outcome(*_keys(task), failed=failed)
    model = task.configs[0]
    entry = Entry(*measured[0], model, dict(measured).get(model), len(measured))
    return Outcome(*_keys(task), entry, measured, failed)


def _keys(task: _Task) -> tuple[str, str]:
    return device_key(task.chip), problem_key(task.problem)
