"""Compiles the kernels of the GPU tests, in parallel and without a GPU.

    python -m tests.gpu.kernels [PART OF A FILE'S NAME]

A file of tests says what it will launch in `kernels()`: items for `jax_deepgemm.precompile`. What no file
names is compiled by the test that needs it.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from jax_deepgemm.core.chip import H200
from jax_deepgemm.jit import KernelSource
from jax_deepgemm.jit.report import CompiledKernel
from jax_deepgemm.tools.precompile import compile_many
from jax_deepgemm.tools.registry import family_of

HERE = Path(__file__).parent


def modules(wanted: str = "") -> Iterator[ModuleType]:
    """The files of GPU tests that name kernels, of those whose names contain `wanted`."""
    for path in sorted(HERE.glob("test_*.py")):
        if wanted in path.stem and "\ndef kernels(" in path.read_text():
            yield importlib.import_module(f"tests.gpu.{path.stem}")


def sources(chosen: Iterable[ModuleType]) -> list[KernelSource]:
    """The kernels that files of tests name, each once."""
    named = (item for module in chosen for item in getattr(module, "kernels", tuple)())
    found = [source for item in named for source in _sources(item)]
    return list({(source.name, source.text): source for source in found}.values())


def _sources(item: Any) -> Iterable[KernelSource]:
    """Of a problem of any family; a kernel stands for itself."""
    if isinstance(item, KernelSource):
        return [item]
    family = family_of(item)
    assert family is not None, item
    return family.sources(item, H200)


def compile_all(chosen: Iterable[ModuleType]) -> list[CompiledKernel]:
    """Compiles them on all cores, or finds them in the cache."""
    return compile_many(sources(chosen), progress=False)


def main(wanted: str = "") -> None:
    begin = time.monotonic()
    found = compile_all(modules(wanted))
    fresh = [one for one in found if not one.report.from_cache]
    print(f"{len(found)} kernels, {len(fresh)} of them compiled now: {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
