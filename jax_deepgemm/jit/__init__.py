"""Kernel sources to cubins: compiler, cache, diagnostics. See `toolchain` for the environment variables."""

from jax_deepgemm.jit.compiler import CompileError, PtxasCheckError, compile_kernel, record_kernels
from jax_deepgemm.jit.report import CompiledKernel, KernelReport, KernelSource
from jax_deepgemm.jit.toolchain import CompilerNotFoundError

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
