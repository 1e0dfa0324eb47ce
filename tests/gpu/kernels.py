"""Compiles the kernels of the GPU tests, in parallel and without a GPU.

    python -m tests.gpu.kernels [PART OF A FILE'S NAME]

A file of tests says what it will launch in `kernels()`: problems of any family, or sources. What no file
names is compiled by the test that needs it.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from jax_deepgemm.core.chip import H200
from jax_deepgemm.jit import CompiledKernel, CompileError, KernelSource, compile_kernel
from jax_deepgemm.tools.registry import family_of

HERE = Path(__file__).parent


def modules(wanted: str = "") -> Iterator[ModuleType]:
    """The files of GPU tests that name kernels, of those whose names contain `wanted`."""
    for path in sorted(HERE.glob("test_*.py")):
        if wanted in path.stem and "\ndef kernels(" in path.read_text():
            yield importlib.import_module(f"tests.gpu.{path.stem}")


def sources(chosen: Iterable[ModuleType]) -> Iterator[KernelSource]:
    """The kernels that files of tests name, each once."""
    seen = set()
    for source in (source for module in chosen for item in _named(module) for source in _sources(item)):
        if (source.name, source.text) not in seen:
            seen.add((source.name, source.text))
            yield source


def _named(module: ModuleType) -> Iterable[Any]:
    return module.kernels() if hasattr(module, "kernels") else ()


def _sources(item: Any) -> Iterable[KernelSource]:
    """Of a problem of any family; a kernel stands for itself."""
    if isinstance(item, KernelSource):
        return [item]
    family = family_of(item)
    assert family is not None, item
    return family.sources(item, H200)


def compile_all(wanted: Iterable[KernelSource]) -> list[CompiledKernel | CompileError]:
    """Compiles kernels on all cores, each while the next ones are still being named."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return [done.result() for done in [threads.submit(_attempt, source) for source in wanted]]


def _attempt(source: KernelSource) -> CompiledKernel | CompileError:
    """What does not compile fails in the tests that need it too."""
    try:
        return compile_kernel(source)
    except CompileError as error:
        return error


def main(part: str = "") -> int:
    begin = time.monotonic()
    found = compile_all(sources(modules(part)))
    errors = [one for one in found if isinstance(one, CompileError)]
    fresh = sum(not one.report.from_cache for one in found if isinstance(one, CompiledKernel))
    print(*errors, f"{len(found)} kernels, {fresh} of them new: {time.monotonic() - begin:.0f} s", sep="\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
