"""CUDA C++ text to cubin.

KernelSource -> key (text, headers, options, compiler) -> memory -> disk -> NVRTC or NVCC -> CompiledKernel
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import io
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_deepgemm.jit import toolchain
from jax_deepgemm.jit.cache import KernelCache, open_cache, write_atomically
from jax_deepgemm.jit.report import CompiledKernel, KernelSource, parse_log
from jax_deepgemm.jit.toolchain import Environment, Toolchain

_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)
_ARCH = re.compile(r"\d{2,3}[af]?")
_memory: dict[tuple[Path, bytes], CompiledKernel] = {}
_recorder: contextvars.ContextVar[list[tuple[KernelSource, CompiledKernel]] | None] = contextvars.ContextVar(
    "jax_deepgemm_recorder", default=None
)


class CompileError(RuntimeError):
    """A kernel did not compile; the message has kernel, parameters, compiler, command and log."""


class PtxasCheckError(CompileError):
    """JAX_DEEPGEMM_PTXAS_CHECK=1, and the kernel spills, uses local memory or has a C75xx note."""


def compile_kernel(source: KernelSource, *, arch: str = "90a") -> CompiledKernel:
    """The cubin of a kernel: from memory, from the cache directory, or compiled.

    Args:
      source: entry name, CUDA C++ text, and its parameters for messages.
      arch: compute capability as in sm_<arch>; Hopper's wgmma and TMA need "90a".

    Returns:
      The cubin, its digest and the compiler's report.

    Raises:
      CompileError: the text does not compile; the message contains the compiler's log.
      PtxasCheckError: it compiles to slow code and JAX_DEEPGEMM_PTXAS_CHECK=1.
      CompilerNotFoundError: no cuda-core, no NVRTC or no nvcc; the message says how to get it.

    >>> text = 'extern "C" __global__ void clear(float* x) { x[threadIdx.x] = 0; }'
    >>> kernel = compile_kernel(KernelSource("clear", text))
    >>> kernel.arch, kernel.report.spill_store_bytes, kernel.cubin[:4]
    ('90a', 0, b'\\x7fELF')
    """
    if not _ARCH.fullmatch(arch):
        raise ValueError(f"compile_kernel: arch is {arch!r}, need a compute capability such as '90a'.")
    settings = toolchain.read_settings()
    job = _Job(source, arch, settings, toolchain.find_toolchain(settings))
    key = job.key()
    kernel = _memory.get((settings.cache_dir, key))
    if kernel is None:
        cache = open_cache(settings.cache_dir)
        kernel = _load_or_compile(cache, key, job)
        _memory[settings.cache_dir, key] = kernel
        _diagnose(cache, job, kernel)
    if settings.ptxas_check and (problems := kernel.report.problems()):
        raise PtxasCheckError(job.message("is slow as compiled", "\n".join(problems)))
    if (records := _recorder.get()) is not None:
        records.append((source, kernel))
    return kernel


@contextlib.contextmanager
def record_kernels() -> Iterator[list[tuple[KernelSource, CompiledKernel]]]:
    """Collects what `compile_kernel` returns in this thread, for reports.

    >>> with record_kernels() as kernels:
    ...     _ = compile_kernel(KernelSource("noop", 'extern "C" __global__ void noop() {}'))
    >>> [source.name for source, _ in kernels]
    ['noop']
    """
    records: list[tuple[KernelSource, CompiledKernel]] = []
    token = _recorder.set(records)
    try:
        yield records
    finally:
        _recorder.reset(token)


@dataclass(frozen=True)
class _Job:
    """All that a compilation depends on."""

    source: KernelSource
    arch: str
    settings: Environment
    compiler: Toolchain

    def key(self) -> bytes:
        """cuda.core's cache key; headers by content, so that equal packages in two places share entries."""
        extra = hashlib.sha256(header_digest(self.source.text, toolchain.INCLUDE_DIR))
        if self.compiler.kind == "nvcc":
            extra.update(f"nvcc {self.compiler.version} {_NVCC_FLAGS}".encode())
        return toolchain.import_cuda_core().utils.make_program_cache_key(
            code=self.source.text,
            code_type="c++",
            options=self.nvrtc_options(with_paths=False),
            target_type="cubin",
            extra_digest=extra.digest(),
        )

    @property
    def standard(self) -> str:
        return f"c++{self.settings.cpp_standard}"

    def nvrtc_options(self, with_paths: bool = True) -> Any:
        return toolchain.import_cuda_core().ProgramOptions(
            name=f"{self.source.name}.cu",
            arch=f"sm_{self.arch}",
            std=self.standard,
            device_as_default_execution_space=True,
            lineinfo=self.settings.lineinfo or None,
            ptxas_options=["-v"],
            include_path=str(toolchain.INCLUDE_DIR) if with_paths else None,
        )

    def nvcc_command(self, target: str, directory: str) -> list[str]:
        return [
            self.compiler.path,
            f"--{target}",
            f"-arch=sm_{self.arch}",
            f"-std={self.standard}",
            *_NVCC_FLAGS,
            *(["-lineinfo"] if self.settings.lineinfo else []),
            f"-I{toolchain.INCLUDE_DIR}",
            "-o",
            f"{directory}/{self.source.name}.{target}",
            f"{directory}/{self.source.name}.cu",
        ]

    def command(self, target: str = "cubin") -> str:
        """The compiler's command line, for people."""
        if self.compiler.kind == "nvcc":
            return " ".join(self.nvcc_command(target, "."))
        options = " ".join(option.decode() for option in self.nvrtc_options().as_bytes("nvrtc", target))
        return f"nvrtc {options} {self.source.name}.cu"

    def message(self, verdict: str, log: str) -> str:
        parameters = ", ".join(f"{key}={value}" for key, value in self.source.parameters)
        return (
            f"kernel {self.source.name} {verdict}.\n"
            f"  parameters: {parameters or 'none'}\n"
            f"  compiler:   {self.compiler}\n"
            f"  command:    {self.command()}\n"
            f"{log.strip()}"
        )


_NVCC_FLAGS = ("--expt-relaxed-constexpr", "-O3", "-Xptxas=-v")


def _load_or_compile(cache: KernelCache, key: bytes, job: _Job) -> CompiledKernel:
    start = time.perf_counter()
    kernel = cache.get_or_compile(key, lambda: _compile(job))
    milliseconds = (time.perf_counter() - start) * 1e3
    if kernel.report.from_cache:
        toolchain.logger.debug("%s: from %s in %.1f ms", job.source, cache.root, milliseconds)
        if job.settings.print_load_time:
            toolchain.say(f"loaded {job.source.name} from disk in {milliseconds:.2f} ms")
    return kernel


def _compile(job: _Job) -> CompiledKernel:
    if job.settings.print_command:
        toolchain.say(job.command())
    start = time.perf_counter()
    cubin, log = build(job, "cubin")
    report = parse_log(log, time.perf_counter() - start)
    if job.source.name.encode() not in cubin:
        raise CompileError(job.message(f'compiles, but has no extern "C" entry {job.source.name}', log))
    toolchain.logger.info(
        "%s: compiled by %s in %.2f s", job.source, job.compiler.kind, report.compile_seconds
    )
    return CompiledKernel(job.source.name, cubin, hashlib.sha256(cubin).hexdigest(), job.arch, report)


def build(job: _Job, target: str) -> tuple[bytes, str]:
    """Runs the compiler: (cubin or PTX, log)."""
    return _build_nvcc(job, target) if job.compiler.kind == "nvcc" else _build_nvrtc(job, target)


def _build_nvrtc(job: _Job, target: str) -> tuple[bytes, str]:
    cuda_core = toolchain.import_cuda_core()
    log = io.StringIO()
    try:
        program = cuda_core.Program(job.source.text, "c++", job.nvrtc_options())
        cubin = program.compile("cubin", logs=log).code
    except Exception as error:  # cuda.core raises several private classes
        raise CompileError(job.message("does not compile", str(error))) from None
    return (_ptx(program) if target == "ptx" else bytes(cubin)), log.getvalue()


def _ptx(program: Any) -> bytes:
    """The PTX that a cubin was made from (asking cuda.core for it instead would need a driver)."""
    from cuda.bindings import nvrtc

    _, size = nvrtc.nvrtcGetPTXSize(program.handle)
    text = b" " * size
    nvrtc.nvrtcGetPTX(program.handle, text)
    return text.rstrip(b"\0 ")


def _build_nvcc(job: _Job, target: str) -> tuple[bytes, str]:
    with tempfile.TemporaryDirectory(prefix="jax_deepgemm-") as directory:
        Path(directory, f"{job.source.name}.cu").write_text(job.source.text)
        done = subprocess.run(
            job.nvcc_command(target, directory), check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise CompileError(job.message("does not compile", done.stdout + done.stderr))
        return Path(directory, f"{job.source.name}.{target}").read_bytes(), done.stdout + done.stderr


def _diagnose(cache: KernelCache, job: _Job, kernel: CompiledKernel) -> None:
    if job.settings.ptxas_verbose:
        toolchain.say(f"{job.source}\n{kernel.report.log}")
    for kind in job.settings.dump:
        path = cache.root / "dump" / f"{kernel.name}.{kernel.digest[:16]}.{kind}"
        if path.exists():
            continue
        try:
            text = build(job, "ptx")[0] if kind == "ptx" else _disassemble(job, kernel)
            write_atomically(path, text)
            toolchain.say(f"wrote {path}")
        except OSError as error:
            toolchain.logger.warning("JAX_DEEPGEMM_DUMP: %s is not written (%s)", path, error)


def _disassemble(job: _Job, kernel: CompiledKernel) -> bytes:
    command = toolchain.find_disassembler()
    if command is None:
        raise FileNotFoundError("no nvdisasm found; get one with: pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.cubin)
        file.flush()
        done = subprocess.run([*command, file.name], check=False, capture_output=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)} fails: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def header_digest(text: str, include_dir: Path) -> bytes:
    """sha256 over the content of every header of the package that a text reaches."""
    digest = hashlib.sha256()
    pending = [(include_dir, text.encode())]
    seen: set[Path] = set()
    while pending:
        directory, content = pending.pop()
        for bracket, name in _INCLUDE.findall(content):
            roots = [directory, include_dir] if bracket == b'"' else [include_dir]
            path = next((root / name.decode() for root in roots if (root / name.decode()).is_file()), None)
            if path is None or path in seen:  # not ours: the compiler's own headers go with its version
                continue
            seen.add(path)
            status = path.stat()
            header = _read_header(path, status.st_mtime_ns, status.st_size)
            digest.update(name + b"\0" + hashlib.sha256(header).digest())
            pending.append((path.parent, header))
    return digest.digest()


@functools.lru_cache(maxsize=256)
def _read_header(path: Path, mtime_ns: int, size: int) -> bytes:
    return path.read_bytes()
