"""Kernel sources to cubins: compiler, cache, diagnostics. See `toolchain` for the environment variables."""

from .compiler import CompileError, PtxasCheckError, compile_kernel, record_kernels
from .report import CompiledKernel, KernelReport, KernelSource
from .toolchain import CompilerNotFoundError

__all__ = [
    "CompileError",
    "CompiledKernel",
    "CompilerNotFoundError",
    "KernelReport",
    "KernelSource",
    "PtxasCheckError",
    "compile_kernel",
    "record_kernels",
]
