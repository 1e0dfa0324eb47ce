"""Times every candidate configuration of GEMM problems on the GPU that is here."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.bench import dense, grouped
from jax_deepgemm.bench.rows import COMPILE_THREADS, Compiled, compile_job
from jax_deepgemm.bench.timing import Job, time_jobs
from jax_deepgemm.introspect import problems
from jax_deepgemm.jit.cli import Shape, traceable
from jax_deepgemm.sm90.chip import Chip
from jax_deepgemm.sm90.config import GemmConfig
from jax_deepgemm.sm90.tuning import Entry, device_key, problem_key, trying

GEMM_PREFIX = "jdg_sm90"
SESSION_JOBS = 256  # timed in one profiler session, more if one problem has more
SESSION_BYTES = 8 << 30  # of operands held at a time
_PERIOD = 1_000_003  # elements after which operands repeat: a prime, so that rows differ
_LARGEST = 2.75  # of 128 standard normal numbers, on average
_FLOAT32 = 2**-7  # scales, and float32 C


@dataclass(frozen=True)
class Work:
    """One product to tune.

    Attributes:
      name: for messages.
      function: calls one GEMM of this package, and leaves `config` open.
      operands: its arguments. Arrays are used as they are; for `jax.ShapeDtypeStruct`s see `drawn`.
    """

    name: str
    function: Callable[..., Any]
    operands: tuple[Any, ...]


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
    measured: list[tuple[GemmConfig, float]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Task:
    work: Work
    problem: Any
    chip: Chip
    configs: list[GemmConfig]

    @functools.cached_property
    def bytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.work.operands))


def table_names() -> list[str]:
    """Returns the tables of `bench` whose problems can be tuned.

    >>> table_names()
    ['fp8', 'fp8_wgrad', 'bf16', 'm_grouped', 'masked', 'k_grouped', 'ragged_dot']
    """
    return [*dense.tables(), *grouped.tables()]


def of_table(name: str) -> list[Work]:
    """Returns the products of one of `table_names`, their operands not drawn yet.

    >>> of_table("bf16")[0].operands[1].shape
    (2112, 7168)
    """
    if name in dense.tables():
        return [
            Work(str(p), dense.product(p), jax.eval_shape(functools.partial(dense.operands, p)))
            for p in dense.tables()[name]
        ]
    return [
        Work(
            str(p),
            grouped.product(p),
            # Sizes are data.
            (*jax.eval_shape(lambda p=p: grouped.operands(p)[:-1]), np.asarray(p.group_sizes, np.int32)),
        )
        for p in grouped.tables()[name]
    ]


def of_shape(shape: Shape) -> Work:
    """Returns the product of a line of a shapes file.

    >>> of_shape(Shape("bf16_gemm_nn", 64, 128, 256)).operands[1].shape
    (256, 128)
    """
    function, *operands = traceable(shape)
    return Work(f"{shape.op} m={shape.m} n={shape.n} k={shape.k}", function, tuple(operands))


def drawn(calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Makes arrays of the `jax.ShapeDtypeStruct`s in the operands of some calls, and puts all on the device.

    Elements of one or two bytes are standard normal, those of FP8 in the range that quantising gives them;
    float32 (scales and C) is constant. Calls whose first (second, ...) operands are alike share them.

    >>> [(a, b)] = drawn([(jax.ShapeDtypeStruct((2, 3), jnp.float32), np.arange(2))])
    >>> a.shape, b.tolist()
    ((2, 3), [0, 1])
    """
    flat = [jax.tree.flatten(operands) for operands in calls]
    wanted: dict[tuple[Any, ...], None] = {}
    for leaves, _ in flat:
        wanted |= {_kind(i, x): None for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)}
    kinds = tuple((shape, dtype) for _, shape, dtype in wanted)
    noise = {dtype: _noise(dtype) for _, dtype in kinds if dtype != "float32"}
    made = dict(zip(wanted, _made(kinds, noise), strict=True))
    return [
        structure.unflatten(
            [
                made[_kind(i, x)] if isinstance(x, jax.ShapeDtypeStruct) else jax.device_put(x)
                for i, x in enumerate(leaves)
            ]
        )
        for leaves, structure in flat
    ]


def _kind(position: int, leaf: Any) -> tuple[Any, ...]:
    return position, leaf.shape, str(leaf.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _made(kinds: tuple[tuple[tuple[int, ...], str], ...], noise: dict[str, jax.Array]) -> list[jax.Array]:
    """One program for all of a session."""
    return [
        jnp.full(shape, _FLOAT32, jnp.float32) if dtype == "float32" else jnp.resize(noise[dtype], shape)
        for shape, dtype in kinds
    ]


@functools.cache
def _noise(dtype: str) -> jax.Array:
    numbers = np.random.default_rng(0).standard_normal(_PERIOD, np.float32)
    if jnp.dtype(dtype).itemsize == 1:
        numbers = np.clip(numbers / _LARGEST, -1, 1) * np.float32(jnp.finfo(dtype).max)
    return jnp.asarray(numbers.astype(jnp.dtype(dtype)))


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
        configs = [config for config, _ in problem.ranked(usable)]
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

    def compiled(name: str, pair: tuple[int, GemmConfig]) -> Compiled:
        task, config = session[pair[0]], pair[1]
        with trying(task.problem, config):
            return compile_job(task.work.function, name, operands[pair[0]])

    with ThreadPoolExecutor(COMPILE_THREADS) as pool:
        programs = list(pool.map(compiled, names, pairs))
    jobs = [Job(name, one.run, GEMM_PREFIX) for name, one in zip(names, programs, strict=True) if one.run]
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


def _outcome(task: _Task, measured: list[tuple[GemmConfig, float]], failed: list[tuple[str, str]]) -> Outcome:
    if not measured:
        return Outcome(*_keys(task), failed=failed)
    model = task.configs[0]
    entry = Entry(*measured[0], model, dict(measured).get(model), len(measured))
    return Outcome(*_keys(task), entry, measured, failed)


def _keys(task: _Task) -> tuple[str, str]:
    return device_key(task.chip), problem_key(task.problem)
