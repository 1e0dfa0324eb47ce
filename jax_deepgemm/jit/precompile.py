"""Warming the kernel cache before the first step of a program."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .compiler import compile_kernel, record_kernels
from .report import CompiledKernel, KernelSource

if TYPE_CHECKING:
    from jax_deepgemm.sm90.chip import Chip

_T = TypeVar("_T")
_QUIET_SECONDS = 2.0
_MANY = 16


class Problem(Protocol):
    """What `precompile` accepts besides functions: an object that knows its kernels."""

    def kernel_sources(self, chip: Chip) -> Sequence[KernelSource]: ...


def compile_many(
    sources: Iterable[KernelSource], *, arch: str = "90a", jobs: int | None = None, progress: bool = True
) -> list[CompiledKernel]:
    """Compiles kernels in parallel; results in the order of `sources`.

    Args:
      sources: the kernels; equal ones are compiled once.
      arch: see `compile_kernel`.
      jobs: threads, by default one per core (the compiler runs outside the interpreter lock).
      progress: show a bar on a terminal's stderr when there are many or they take more than two seconds.

    Raises:
      CompileError: of the first kernel that fails, after the others have been stopped.
    """
    wanted = list(sources)
    unique = {(source.name, source.text): source for source in wanted}
    tasks = [functools.partial(compile_kernel, source, arch=arch) for source in unique.values()]
    found = dict(zip(unique, _parallel(tasks, jobs, progress), strict=True))
    return [found[source.name, source.text] for source in wanted]


def precompile(
    items: Iterable[Problem | KernelSource | tuple[Any, ...]],
    *,
    chip: Chip | None = None,
    jobs: int | None = None,
    progress: bool = True,
) -> list[CompiledKernel]:
    """Compiles all kernels that some problems or functions need, and stores them in the cache directory.

    Needs no GPU: a build machine can fill a cache directory that training jobs mount.

    Args:
      items: each a problem (an object with `kernel_sources(chip)`), or a tuple (function, *arguments) with a jitted or
        plain function and arrays or `jax.ShapeDtypeStruct`s; functions are lowered for platform "cuda", not run.
      chip: the GPU model to choose configurations for, by default an H200.
      jobs: threads, by default one per core.
      progress: see `compile_many`.

    Returns:
      The kernels, without repetition.

    >>> import jax, jax.numpy as jnp
    >>> precompile([(jnp.sin, jax.ShapeDtypeStruct((4,), jnp.float32))])    # no kernel of this package inside
    []
    """
    kernels = [kernel for _, kernel in precompile_records(items, chip=chip, jobs=jobs, progress=progress)]
    return list({kernel.digest: kernel for kernel in kernels}.values())


def precompile_records(
    items: Iterable[Any], *, chip: Chip | None = None, jobs: int | None = None, progress: bool = True
) -> list[tuple[KernelSource, CompiledKernel]]:
    """`precompile`, with the source of each kernel."""
    from jax_deepgemm.sm90.chip import H200

    tasks = [_task(item, chip or H200) for item in items]
    return [record for records in _parallel(tasks, jobs, progress) for record in records]


def _task(item: Any, chip: Chip) -> Callable[[], list[tuple[KernelSource, CompiledKernel]]]:
    if isinstance(item, tuple) and item and callable(item[0]):
        return lambda: _lower(item[0], item[1:])
    if isinstance(item, KernelSource):
        return lambda: [(item, compile_kernel(item, arch=chip.arch))]
    if hasattr(item, "kernel_sources"):
        return lambda: [
            (source, compile_kernel(source, arch=chip.arch)) for source in item.kernel_sources(chip)
        ]
    raise TypeError(
        f"precompile: got {item!r}, need a problem (an object with kernel_sources(chip)) or a tuple "
        "(function, *arguments) with arrays or jax.ShapeDtypeStructs."
    )


def _lower(function: Callable[..., Any], args: tuple[Any, ...]) -> list[tuple[KernelSource, CompiledKernel]]:
    import jax

    jitted: Any = function if hasattr(function, "trace") else jax.jit(function)
    with record_kernels() as records:
        jitted.trace(*args).lower(lowering_platforms=("cuda",))
    return records


def _parallel(tasks: Sequence[Callable[[], _T]], jobs: int | None, progress: bool) -> list[_T]:
    bar = _Progress(len(tasks)) if progress else None
    with ThreadPoolExecutor(max_workers=jobs or os.cpu_count() or 1) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                if bar:
                    bar.show(done)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if bar:
                bar.close()
    return [future.result() for future in futures]


class _Progress:
    """A bar on a terminal's stderr, for work that is long enough to wonder about."""

    def __init__(self, total: int) -> None:
        self.total, self.start, self.shown = total, time.monotonic(), False

    def show(self, done: int) -> None:
        elapsed = time.monotonic() - self.start
        if sys.stderr.isatty() and (elapsed > _QUIET_SECONDS or self.total >= _MANY):
            self.shown = True
            sys.stderr.write(f"\r{self.line(done, elapsed)}")
            sys.stderr.flush()

    def line(self, done: int, elapsed: float) -> str:
        filled = 30 * done // max(self.total, 1)
        return f"compiling [{'#' * filled}{'.' * (30 - filled)}] {done}/{self.total}  {elapsed:.0f} s"

    def close(self) -> None:
        if self.shown:
            sys.stderr.write("\n")
