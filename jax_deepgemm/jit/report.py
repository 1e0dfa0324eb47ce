"""What goes into a kernel compilation and what comes out of it: plain data."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_CUMULATIVE_STACK = re.compile(r"(\d+) bytes cumulative stack size")
_NOTABLE = re.compile(r"\(C\d{4}\)|\bwarning\b", re.IGNORECASE)
_PERFORMANCE_CODE = re.compile(r"\(C75\d\d\)")


@dataclass(frozen=True)
class KernelSource:
    """One kernel, one translation unit.

    Attributes:
      name: the kernel's `extern "C"` entry, e.g. "jdg_sm90_fp8_nt_128x192_s5".
      text: CUDA C++ that includes device headers as `#include <jax_deepgemm/...cuh>`.
      parameters: compile-time parameters as (name, value) pairs, shown in errors and reports.
      shared_memory: bytes of dynamic shared memory of its launches, shown in reports.
    """

    name: str
    text: str
    parameters: tuple[tuple[str, object], ...] = ()
    shared_memory: int = 0

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.parameters)})"


@dataclass(frozen=True)
class KernelReport:
    """What the compiler said about a kernel.

    Attributes:
      registers: per thread at entry (before any setmaxnreg).
      spill_store_bytes: register spills, stores.
      spill_load_bytes: register spills, loads.
      stack_bytes: largest stack frame of a function.
      local_bytes: local memory per thread (stack of the whole call chain).
      static_smem_bytes: static shared memory per block.
      compile_seconds: time the compiler took when the kernel was built.
      from_cache: True if this process found it on disk.
      warnings: lines of the log with a warning or a ptxas code such as (C7510).
      log: the whole compiler log.
    """

    registers: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    stack_bytes: int = 0
    local_bytes: int = 0
    static_smem_bytes: int = 0
    compile_seconds: float = 0.0
    from_cache: bool = False
    warnings: tuple[str, ...] = ()
    log: str = field(default="", repr=False)

    def problems(self) -> tuple[str, ...]:
        """What costs speed: spills, local memory, ptxas performance notes (C75xx)."""
        found = [line for line in self.warnings if _PERFORMANCE_CODE.search(line)]
        if self.spill_store_bytes or self.spill_load_bytes:
            found.append(
                f"spills: {self.spill_store_bytes} bytes stored, {self.spill_load_bytes} bytes loaded"
            )
        if self.local_bytes:
            found.append(f"local memory: {self.local_bytes} bytes per thread")
        return tuple(found)


@dataclass(frozen=True)
class CompiledKernel:
    """A cubin with its content digest (sha256, hexadecimal) and the compiler's report."""

    name: str
    cubin: bytes = field(repr=False)
    digest: str
    arch: str
    report: KernelReport = field(default_factory=KernelReport, compare=False)


def parse_log(log: str, compile_seconds: float) -> KernelReport:
    """Reads the output of `ptxas -v`.

    >>> text = '''ptxas info    : (C7510) Potential Performance Loss: wgmma serialised
    ...     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
    ... ptxas info    : Used 36 registers, used 1 barriers, 8 bytes cumulative stack size, 1024 bytes smem'''
    >>> report = parse_log(text, 0.1)
    >>> report.registers, report.spill_load_bytes, report.local_bytes, report.static_smem_bytes
    (36, 12, 8, 1024)
    >>> len(report.problems())
    3
    """

    def largest(pattern: str) -> int:
        return max((int(number) for number in re.findall(pattern, log)), default=0)

    frames = [tuple(map(int, match)) for match in _SPILLS.findall(log)]
    stack = max((frame[0] for frame in frames), default=0)
    return KernelReport(
        registers=largest(r"Used (\d+) registers"),
        spill_store_bytes=sum(frame[1] for frame in frames),
        spill_load_bytes=sum(frame[2] for frame in frames),
        stack_bytes=stack,
        local_bytes=max(stack, largest(_CUMULATIVE_STACK.pattern), largest(r"(\d+) bytes lmem")),
        static_smem_bytes=largest(r"(\d+) bytes smem"),
        compile_seconds=compile_seconds,
        warnings=tuple(line.strip() for line in log.splitlines() if _NOTABLE.search(line)),
        log=log.strip(),
    )


def describe(source: KernelSource, kernel: CompiledKernel) -> dict[str, Any]:
    """The machine-readable line of one kernel, as `python -m jax_deepgemm compile --json` prints it."""
    report = kernel.report
    return {
        "name": kernel.name,
        "arch": kernel.arch,
        "parameters": {
            key: value if isinstance(value, int | float | str) else str(value)
            for key, value in source.parameters
        },
        "registers": report.registers,
        "spill_bytes": report.spill_store_bytes + report.spill_load_bytes,
        "local_bytes": report.local_bytes,
        "static_shared_memory": report.static_smem_bytes,
        "dynamic_shared_memory": source.shared_memory,
        "compile_seconds": round(report.compile_seconds, 4),
        "from_cache": report.from_cache,
        "warnings": list(report.warnings),
        "cubin_bytes": len(kernel.cubin),
        "digest": kernel.digest,
    }
