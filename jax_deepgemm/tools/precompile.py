"""Warming the kernel cache before the first step of a program."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeAlias, TypeVar

import jax

from jax_deepgemm.core.chip import H200, Chip
from jax_deepgemm.core.family import Problem
from jax_deepgemm.core.shapes import Call, CallShape
from jax_deepgemm.jit.compiler import compile_kernel, record_kernels
from jax_deepgemm.jit.report import CompiledKernel, KernelSource
from jax_deepgemm.tools import registry
from jax_deepgemm.tools.shape_files import shape_of
from jax_deepgemm.tools.text import Progress

_T = TypeVar("_T")
_QUIET_SECONDS = 2.0


def compile_many(
    sources: Iterable[KernelSource], *, arch: str = "90a", jobs: int | None = None, progress: bool = True
) -> list[CompiledKernel]:
    """Compiles kernels in parallel; results in the order of `sources`.

    Args:
      sources: the kernels; equal ones are compiled once.
      arch: see `compile_kernel`.
      jobs: threads, by default one per core (the compiler runs outside the interpreter lock).
      progress: show a bar on stderr if it takes more than two seconds.

    Raises:
      CompileError: of the first kernel that fails, after the others have been stopped.
    """
    wanted = list(sources)
    unique = {(source.name, source.text): source for source in wanted}
    tasks = [functools.partial(compile_kernel, source, arch=arch) for source in unique.values()]
    found = dict(zip(unique, _parallel(tasks, jobs, progress), strict=True))
    return [found[source.name, source.text] for source in wanted]


def precompile(
    items: Iterable[Mapping[str, Any] | CallShape | Problem | KernelSource | tuple[Any, ...]],
    *,
    chip: Chip | None = None,
    jobs: int | None = None,
    progress: bool = True,
) -> list[CompiledKernel]:
    """Compiles all kernels that some problems or functions need, and stores them in the cache directory.

    Needs no GPU: a build machine can fill a cache directory that training jobs mount.

    Args:
      items: each one of
        a shape, as a dict with the fields of a line of a shapes file (`python -m jax_deepgemm compile
        --help` lists them): a dense or grouped GEMM, or a layer of experts, forward and backward;
        a tuple (function, *arguments) with a jitted or plain function and arrays or
        `jax.ShapeDtypeStruct`s; functions are lowered for platform "cuda", not run;
        a problem of a family of kernels, such as a `GemmProblem`;
        a `jax_deepgemm.jit.KernelSource`.
      chip: the GPU model to choose configurations for, by default an H200.
      jobs: threads, by default one per core. Functions are traced in the calling thread and lowered in the
        others, which know nothing of contexts such as `jax.enable_x64`; jobs=1 stays in the calling thread.
      progress: see `compile_many`.

    Returns:
      The kernels, without repetition.

    Raises:
      ValueError: a shape that cannot be; the message says what it needs.
      TypeError: an item of another kind.
      CompileError, CompilerNotFoundError: see `jax_deepgemm.jit.compile_kernel`.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import GemmProblem, bf16_gemm_nt
    >>> a = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
    >>> [kernel] = precompile([(bf16_gemm_nt, a, a)])
    >>> kernel.arch, kernel.report.spill_store_bytes
    ('90a', 0)
    >>> precompile([GemmProblem(m=256, n=256, k=512, a="bf16", b="bf16", b_scales="none")]) == [kernel]
    True
    >>> precompile([{"op": "bf16_gemm_nt", "m": 256, "n": 256, "k": 512}]) == [kernel]
    True
    """
    kernels = [kernel for _, kernel in precompile_records(items, chip=chip, jobs=jobs, progress=progress)]
    return list({kernel.digest: kernel for kernel in kernels}.values())


def precompile_records(
    items: Iterable[Any], *, chip: Chip | None = None, jobs: int | None = None, progress: bool = True
) -> list[tuple[KernelSource, CompiledKernel]]:
    """`precompile`, with the source of each kernel."""
    tasks = [task for item in items for task in _tasks(item, chip or H200)]
    return [record for records in _parallel(tasks, jobs, progress) for record in records]


_Records: TypeAlias = list[tuple[KernelSource, CompiledKernel]]


def _tasks(item: Any, chip: Chip) -> list[Callable[[], _Records]]:
    """Traces what is to be traced, in this thread; the rest may run in any."""
    if isinstance(item, Mapping):
        item = shape_of(item)
    if isinstance(item, CallShape):
        return [functools.partial(_lower_call, item, _traced(item, call)) for call in item.calls()]
    if isinstance(item, tuple) and item and callable(item[0]):
        return [functools.partial(_lower, _trace(item[0], item[1:]))]
    if isinstance(item, KernelSource):
        return [lambda: [(item, compile_kernel(item, arch=chip.arch))]]
    family = registry.family_of(item)
    if family is not None:
        sources = functools.partial(family.sources, item, chip)
        return [lambda: [(one, compile_kernel(one, arch=chip.arch)) for one in sources()]]
    raise TypeError(
        f"precompile: got {item!r}, need a shape (a dict with op and its sizes), a tuple (function, "
        "*arguments) with arrays or jax.ShapeDtypeStructs, or a problem of a family, such as GemmProblem."
    )


def _traced(shape: CallShape, call: Call) -> Any:
    with _naming(shape):
        return _trace(call.function, call.operands)


def _lower_call(shape: CallShape, traced: Any) -> _Records:
    with _naming(shape):
        return _lower(traced)


@contextlib.contextmanager
def _naming(shape: CallShape) -> Iterator[None]:
    """Says which shape it is that an op refuses."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{shape}: {error}") from error


def _trace(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """A plain function is traced under a name of its own, because JAX keeps what it lowered once, and a
    lowering that is kept asks for no kernel."""
    jitted: Any = function if hasattr(function, "trace") else jax.jit(lambda *given: function(*given))
    return jitted.trace(*args)


def _lower(traced: Any) -> _Records:
    with record_kernels() as records:
        traced.lower(lowering_platforms=("cuda",))
    return records


def _parallel(tasks: Sequence[Callable[[], _T]], jobs: int | None, progress: bool) -> list[_T]:
    jobs = min(jobs or os.cpu_count() or 1, len(tasks))
    quiet = _QUIET_SECONDS if progress else math.inf
    with Progress(len(tasks), "compiling", quiet=quiet) as bar:
        if jobs <= 1:
            return [_step(task, bar) for task in tasks]
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            futures = [pool.submit(contextvars.copy_context().run, task) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.step()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    return [future.result() for future in futures]


def _step(task: Callable[[], _T], bar: Progress) -> _T:
    result = task()
    bar.step()
    return result
