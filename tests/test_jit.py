"""The compiler, its cache and its diagnostics. Everything here runs without a GPU."""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_deepgemm import jit
from jax_deepgemm.jit import CompileError, KernelSource, cache, cli, compiler, report, toolchain
from jax_deepgemm.jit.precompile import precompile_records
from jax_deepgemm.jit.report import parse_log

# wgmma and setmaxnreg exist for sm_90a only: that this compiles proves the target.
HOPPER = r"""
extern "C" __global__ void __launch_bounds__(128, 1) hopper(float* out, long a, long b) {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
  float d[4] = {0, 0, 0, 0};
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, %4, %5, 1, 1, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
}
"""
LOCAL_MEMORY = r"""
extern "C" __global__ void local(float* out, const int* index) {
  float table[64];
  for (int i = 0; i < 64; ++i) table[i] = out[i];
  for (int i = 0; i < index[0]; ++i) table[index[i] & 63] += 1;
  out[threadIdx.x] = table[index[1] & 63];
}
"""
IGNORED_SETMAXNREG = (
    'extern "C" __global__ void f() { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }'
)


def fill(value: int = 1) -> KernelSource:
    text = f'extern "C" __global__ void fill(float* x) {{ x[threadIdx.x] = {value}; }}'
    return KernelSource("fill", text, (("value", value),))


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and an empty environment for each test."""
    for name in [name for name in os.environ if name.startswith(toolchain.PREFIX)]:
        monkeypatch.delenv(name)
    directory = tmp_path / "cache"
    monkeypatch.setenv("JAX_DEEPGEMM_CACHE_DIR", str(directory))
    forget()
    return directory


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that went through a compiler."""
    names: list[str] = []
    build = compiler.build

    def counted(job: Any, target: str) -> tuple[bytes, str]:
        names.append(job.source.name)
        return build(job, target)

    monkeypatch.setattr(compiler, "build", counted)
    return names


def forget() -> None:
    """What a new process would not know."""
    compiler._memory.clear()
    cache._open.cache_clear()


def python(script: str, **env: str) -> subprocess.Popen[str]:
    env = {**os.environ, **env}
    return subprocess.Popen([sys.executable, "-c", script], env=env, text=True, stdout=subprocess.PIPE)


# --- compiling ------------------------------------------------------------------------------------


def test_compiles_for_sm_90a() -> None:
    kernel = jit.compile_kernel(KernelSource("hopper", HOPPER))
    print(f"cold compile {kernel.report.compile_seconds:.3f} s")
    assert kernel.arch == "90a"
    assert kernel.cubin.startswith(b"\x7fELF")
    assert len(kernel.digest) == 64
    assert kernel.report.registers > 0
    assert kernel.report.problems() == ()
    assert not kernel.report.from_cache
    assert kernel.report.compile_seconds > 0


def test_same_text_for_plain_sm_90_fails() -> None:
    with pytest.raises(CompileError, match="sm_90"):
        jit.compile_kernel(KernelSource("hopper", HOPPER), arch="90")


@pytest.mark.parametrize("arch", ["sm_90a", "9", "hopper", ""])
def test_arch_is_checked(arch: str) -> None:
    with pytest.raises(ValueError, match="need a compute capability such as '90a'"):
        jit.compile_kernel(fill(), arch=arch)


def test_compile_error_tells_all() -> None:
    source = KernelSource(
        "broken", 'extern "C" __global__ void broken() { floatt x; }', (("m", 64), ("n", 128))
    )
    with pytest.raises(CompileError) as error:
        jit.compile_kernel(source)
    for part in (
        "kernel broken does not compile",
        "m=64, n=128",
        "nvrtc",
        "-arch=sm_90a",
        'identifier "floatt"',
    ):
        assert part in str(error.value)


def test_missing_entry_is_an_error() -> None:
    with pytest.raises(CompileError, match='no extern "C" entry absent'):
        jit.compile_kernel(KernelSource("absent", fill().text))


def test_in_memory_after_the_first_time(count: list[str]) -> None:
    assert jit.compile_kernel(fill()) is jit.compile_kernel(fill())
    assert count == ["fill"]


def test_needs_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    toolchain._find_nvrtc.cache_clear()
    with pytest.raises(jit.CompilerNotFoundError, match=r'pip install "cuda-core\[cu12\]>=1"'):
        jit.compile_kernel(fill())


def test_needs_a_cuda_core_with_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("cuda.core.utils.FileStreamProgramCache")
    with pytest.raises(jit.CompilerNotFoundError, match=r"cuda-core >= 1\.0.*FileStreamProgramCache"):
        toolchain.import_cuda_core()


def test_needs_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda.pathfinder

    def missing(name: str) -> None:
        raise RuntimeError(f"{name} not there")

    monkeypatch.setattr(cuda.pathfinder, "load_nvidia_dynamic_lib", missing)
    toolchain._find_nvrtc.cache_clear()
    with pytest.raises(jit.CompilerNotFoundError, match=r"nvrtc not there.*pip install nvidia-cuda-nvrtc"):
        jit.compile_kernel(fill())


# --- nvcc -----------------------------------------------------------------------------------------

needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")


@needs_nvcc
def test_nvcc(monkeypatch: pytest.MonkeyPatch, count: list[str]) -> None:
    by_nvrtc = jit.compile_kernel(KernelSource("hopper", HOPPER))
    monkeypatch.setenv("JAX_DEEPGEMM_COMPILER", "nvcc")
    by_nvcc = jit.compile_kernel(KernelSource("hopper", HOPPER))
    assert count == ["hopper", "hopper"], "each compiler has its own cache entries"
    assert by_nvcc.report.registers > 0
    assert by_nvcc.report.problems() == ()
    assert by_nvrtc.arch == by_nvcc.arch
    with pytest.raises(CompileError, match=r"(?s)compiler:   nvcc .*-arch=sm_90a.*floatt"):
        jit.compile_kernel(KernelSource("bad", 'extern "C" __global__ void bad() { floatt x; }'))


def test_nvcc_is_searched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("own", "home/bin", "path"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "nvcc").write_text("#!/bin/sh\necho 'release 12.9, V12.9.86'\n")
        (tmp_path / place / "nvcc").chmod(0o755)
    monkeypatch.setenv("JAX_DEEPGEMM_COMPILER", "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "path"), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    for name, value, expected in (
        ("PATH", os.environ["PATH"], "path"),
        ("CUDA_HOME", str(tmp_path / "home"), "home/bin"),
        ("JAX_DEEPGEMM_NVCC", str(tmp_path / "own/nvcc"), "own"),
    ):
        monkeypatch.setenv(name, value)
        found = toolchain.find_toolchain(toolchain.read_settings())
        assert found == toolchain.Toolchain("nvcc", "12.9.86", str(tmp_path / expected / "nvcc"))


def test_missing_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_DEEPGEMM_COMPILER", "nvcc")
    monkeypatch.setenv("JAX_DEEPGEMM_NVCC", "/nowhere/nvcc")
    with pytest.raises(jit.CompilerNotFoundError, match=r"looked for /nowhere/nvcc\. Set JAX_DEEPGEMM_NVCC"):
        jit.compile_kernel(fill())


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("COMPILER", "clang", "nvrtc, nvcc"),
        ("PTXAS_CHECK", "yes", "0 or 1"),
        ("DUMP", "ptx,elf", "ptx, sass"),
        ("LOG", "all", "debug, info, warning, error"),
    ],
)
def test_settings_are_checked(name: str, value: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"JAX_DEEPGEMM_{name}", value)
    with pytest.raises(ValueError, match=f"JAX_DEEPGEMM_{name} is .* need .*{rule}"):
        toolchain.read_settings()


def test_describe_the_toolchain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert toolchain.describe()["compiler"].startswith("nvrtc ")
    monkeypatch.setenv("JAX_DEEPGEMM_COMPILER", "nvcc")
    monkeypatch.setenv("JAX_DEEPGEMM_NVCC", "/nowhere/nvcc")
    assert toolchain.describe()["compiler"].startswith("none: ")


def test_every_variable_is_in_the_table() -> None:
    documented = {
        line.split()[1] for line in (toolchain.__doc__ or "").splitlines() if line.startswith("| JAX")
    }
    fields = {toolchain.PREFIX + name.upper() for name in toolchain.Settings.__dataclass_fields__}
    assert documented == fields


def test_log_goes_to_stderr_from_its_level_on() -> None:
    script = (
        "import logging, jax_deepgemm; log = logging.getLogger('jax_deepgemm'); log.info('a'); log.debug('b')"
    )
    environment = {**os.environ, "JAX_DEEPGEMM_LOG": "info"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, text=True, capture_output=True, check=True
    )
    assert [line for line in done.stderr.splitlines() if "jax_deepgemm" in line] == ["jax_deepgemm: INFO: a"]


# --- cache ----------------------------------------------------------------------------------------


def test_second_process_reads_from_disk(cache_dir: Path) -> None:
    kernel = jit.compile_kernel(fill())
    assert cache.cache_dir() == cache_dir
    assert (cache.cubin_directory() / f"{kernel.digest}.cubin").read_bytes() == kernel.cubin
    script = f"""
import time
from jax_deepgemm import jit
from jax_deepgemm.jit import toolchain
source = jit.KernelSource({fill().name!r}, {fill().text!r})
jit.compile_kernel(jit.KernelSource("other", source.text.replace("fill", "other")))   # imports cuda.core
start = time.perf_counter()
kernel = jit.compile_kernel(source)
print(kernel.report.from_cache, kernel.digest, kernel.report.registers, time.perf_counter() - start)
"""
    from_cache, digest, registers, seconds = python(script).communicate()[0].split()
    print(f"disk hit in {float(seconds) * 1e3:.2f} ms")
    assert (from_cache, digest, int(registers)) == ("True", kernel.digest, kernel.report.registers)
    assert float(seconds) < 0.05  # 5 ms promised; the rest is for a loaded machine


def test_report_survives_on_disk(count: list[str]) -> None:
    first = jit.compile_kernel(KernelSource("local", LOCAL_MEMORY))
    forget()
    again = jit.compile_kernel(KernelSource("local", LOCAL_MEMORY))
    assert count == ["local"]
    assert again == first
    assert again.report.from_cache
    assert again.report.problems() == first.report.problems()
    assert again.report.log == first.report.log


def test_changed_header_is_a_new_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: list[str]
) -> None:
    include = tmp_path / "include"
    (include / "jax_deepgemm/deep").mkdir(parents=True)
    (include / "jax_deepgemm/outer.cuh").write_text('#pragma once\n#include "deep/inner.cuh"\n')
    inner = include / "jax_deepgemm/deep/inner.cuh"
    monkeypatch.setattr(toolchain, "INCLUDE_DIR", include)
    text = '#include <jax_deepgemm/outer.cuh>\nextern "C" __global__ void f(int* x) { *x = VALUE; }'
    digests = []
    for value in (1, 2, 1):
        inner.write_text(f"#pragma once\n#define VALUE {value}\n")
        os.utime(inner, ns=(value, value))
        digests.append(jit.compile_kernel(KernelSource("f", text)).digest)
    assert digests[0] == digests[2] != digests[1]
    assert count == ["f", "f"]


def test_place_of_the_package_is_not_in_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: list[str]
) -> None:
    for place in ("one", "two"):
        (tmp_path / place / "jax_deepgemm").mkdir(parents=True)
        (tmp_path / place / "jax_deepgemm/h.cuh").write_text("#define VALUE 1\n")
        monkeypatch.setattr(toolchain, "INCLUDE_DIR", tmp_path / place)
        text = '#include <jax_deepgemm/h.cuh>\nextern "C" __global__ void f(int* x) { *x = VALUE; }'
        jit.compile_kernel(KernelSource("f", text))
    assert count == ["f"]


def test_options_are_in_the_key(monkeypatch: pytest.MonkeyPatch, count: list[str]) -> None:
    jit.compile_kernel(fill())
    monkeypatch.setenv("JAX_DEEPGEMM_LINEINFO", "1")
    with_lines = jit.compile_kernel(fill())
    assert count == ["fill", "fill"]
    assert b".debug_line" in with_lines.cubin


def test_sixteen_processes_compile_once(tmp_path: Path) -> None:
    script = f"""
import os, time
from jax_deepgemm import jit
from jax_deepgemm.jit import compiler
build = compiler.build
def counted(*args):
    os.close(os.open({str(tmp_path)!r} + f"/built-{{os.getpid()}}", os.O_CREAT))
    time.sleep(0.3)
    return build(*args)
compiler.build = counted
compiler.toolchain.import_cuda_core()
open({str(tmp_path)!r} + f"/ready-{{os.getpid()}}", "w").close()
while not os.path.exists({str(tmp_path)!r} + "/go"):
    time.sleep(0.01)
print(jit.compile_kernel(jit.KernelSource({fill().name!r}, {fill().text!r})).digest)
"""
    processes = [python(script) for _ in range(16)]
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("ready-*"))) < 16 and time.monotonic() < deadline:
        time.sleep(0.05)
    (tmp_path / "go").touch()
    digests = {process.communicate()[0].strip() for process in processes}
    assert digests == {jit.compile_kernel(fill()).digest}
    assert len(list(tmp_path.glob("built-*"))) == 1
    assert not list((tmp_path / "cache/locks").iterdir())


def test_threads_compile_once(count: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        kernels = list(pool.map(lambda _: jit.compile_kernel(fill()), range(8)))
    assert len(set(kernels)) == 1
    assert count == ["fill"]


def test_lock_timeout_compiles_anyway(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.2)
    held: list[int] = []
    acquire = cache._acquire

    def contended(path: Path, deadline: float) -> int | None:
        held.append(os.open(path, os.O_CREAT | os.O_RDWR))
        fcntl.flock(held[0], fcntl.LOCK_EX)
        return acquire(path, deadline)

    monkeypatch.setattr(cache, "_acquire", contended)
    assert jit.compile_kernel(fill()).cubin
    assert "still locked" in caplog.text
    os.close(held[0])


def test_lock_of_a_dead_process_is_free(cache_dir: Path) -> None:
    settings = toolchain.read_settings()
    key = compiler._Job(fill(), "90a", settings, toolchain.find_toolchain(settings)).key()
    (cache_dir / "locks").mkdir(parents=True)
    (cache_dir / "locks" / f"{key.hex()}.lock").touch()
    start = time.monotonic()
    jit.compile_kernel(fill())
    assert time.monotonic() - start < 5


def check_one_warning(caplog: pytest.LogCaptureFixture, directory: Path) -> None:
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert str(directory) in warnings[0]
    assert "JAX_DEEPGEMM_CACHE_DIR" in warnings[0]


def test_unusable_directory(cache_dir: Path, count: list[str], caplog: pytest.LogCaptureFixture) -> None:
    cache_dir.write_text("a file, not a directory")
    assert jit.compile_kernel(fill()) is jit.compile_kernel(fill())
    jit.compile_kernel(fill(2))
    assert count == ["fill", "fill"]
    check_one_warning(caplog, cache_dir)


def test_threads_warn_once(cache_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache_dir.write_text("a file, not a directory")
    jit.compile_many([fill(value) for value in range(4)], jobs=4)
    check_one_warning(caplog, cache_dir)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("place", ["cubin", "manifest"])
def test_full_or_read_only_disk(
    code: int,
    place: str,
    cache_dir: Path,
    count: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from cuda.core.utils import FileStreamProgramCache

    stored = jit.compile_kernel(fill(0))
    forget()

    def fail(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    if place == "manifest":
        monkeypatch.setattr(FileStreamProgramCache, "__setitem__", fail)
    else:
        monkeypatch.setattr(cache, "write_atomically", fail)
    assert jit.compile_kernel(fill(0)) == stored, "reading still works"
    for value in (1, 2):
        assert jit.compile_kernel(fill(value)) is jit.compile_kernel(fill(value))
    assert count == ["fill"] * 3
    check_one_warning(caplog, cache_dir)


@pytest.mark.parametrize(
    "damage", ["cubin cut", "cubin gone", "cubin of another", "manifest cut", "manifest other"]
)
def test_damaged_entry_is_compiled_again(damage: str, cache_dir: Path, count: list[str]) -> None:
    kernel = jit.compile_kernel(fill())
    cubin = cache_dir / "cubins" / f"{kernel.digest}.cubin"
    (manifest,) = (path for path in (cache_dir / "entries").rglob("*") if path.is_file())
    match damage:
        case "cubin cut":
            cubin.write_bytes(kernel.cubin[:100])
        case "cubin gone":
            cubin.unlink()
        case "cubin of another":
            cubin.write_bytes(jit.compile_kernel(KernelSource("hopper", HOPPER)).cubin)
        case "manifest cut":
            manifest.write_bytes(manifest.read_bytes()[:50])
        case "manifest other":
            manifest.write_text('{"version": 2}')
    count.clear()
    forget()
    assert jit.compile_kernel(fill()) == kernel
    assert cubin.read_bytes() == kernel.cubin
    forget()
    assert jit.compile_kernel(fill()).report.from_cache
    assert count == ["fill"]


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    cache.write_atomically(path, b"old")

    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        cache.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_forked_children_compile(tmp_path: Path) -> None:
    script = f"""
import os
from jax_deepgemm import jit
text = {fill().text!r}
jit.compile_kernel(jit.KernelSource("fill", text))
children = []
for value in range(8):
    if not (child := os.fork()):
        kernel = jit.compile_kernel(jit.KernelSource("fill", text.replace("= 1", f"= {{value + 5}}")))
        os._exit(0 if jit.compile_kernel(jit.KernelSource("fill", text)).cubin and kernel.cubin else 1)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
    assert python(script).communicate(timeout=120)[0].strip() == str([0] * 8)
    assert len(list((tmp_path / "cache/cubins").iterdir())) == 9


# --- diagnostics ----------------------------------------------------------------------------------


def test_reports_local_memory_and_c75xx() -> None:
    local = jit.compile_kernel(KernelSource("local", LOCAL_MEMORY)).report
    assert local.local_bytes >= 256
    assert local.stack_bytes >= 256
    assert "local memory" in local.problems()[0]
    ignored = jit.compile_kernel(KernelSource("f", IGNORED_SETMAXNREG)).report
    assert any("(C7508)" in line for line in ignored.warnings)
    assert ignored.problems() == ignored.warnings


def test_parse_log_of_several_functions() -> None:
    log = """
ptxas warning : Something to know
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x
ptxas info    : Function properties for helper
    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for main
    0 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers, 24 bytes cumulative stack size, 2048 bytes smem
"""
    found = parse_log(log, 0.5)
    assert (found.registers, found.spill_store_bytes, found.spill_load_bytes) == (168, 12, 16)
    assert (found.stack_bytes, found.local_bytes, found.static_smem_bytes) == (24, 24, 2048)
    assert len(found.warnings) == 2
    assert len(found.problems()) == 3


@pytest.mark.parametrize(
    "source", [KernelSource("local", LOCAL_MEMORY), KernelSource("f", IGNORED_SETMAXNREG)]
)
def test_ptxas_check(source: KernelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    jit.compile_kernel(source)
    monkeypatch.setenv("JAX_DEEPGEMM_PTXAS_CHECK", "1")
    for _ in ("from memory", "from disk"):
        with pytest.raises(jit.PtxasCheckError, match=r"local memory|C7508"):
            jit.compile_kernel(source)
        forget()
    jit.compile_kernel(fill())


def test_line_numbers_are_in_the_ptx(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_DEEPGEMM_DUMP", "ptx")
    texts = []
    for switch in ("0", "1"):
        monkeypatch.setenv("JAX_DEEPGEMM_LINEINFO", switch)
        kernel = jit.compile_kernel(fill())
        texts.append((cache_dir / "dump" / f"fill.{kernel.digest[:16]}.ptx").read_text())
    assert [".loc" in text for text in texts] == [False, True]


def test_prints(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("PRINT_COMMAND", "PTXAS_VERBOSE", "PRINT_LOAD_TIME"):
        monkeypatch.setenv(f"JAX_DEEPGEMM_{name}", "1")
    jit.compile_kernel(fill())
    cold = capfd.readouterr().err
    assert "nvrtc" in cold
    assert "-arch=sm_90a" in cold
    assert "fill(value=1)\n" in cold
    assert "registers" in cold
    forget()
    jit.compile_kernel(fill())
    warm = capfd.readouterr().err
    assert "loaded fill from disk in" in warm
    assert "-arch" not in warm
    assert "registers" in warm


def test_dumps(cache_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "nvdisasm"
    fake.write_text("#!/bin/sh\necho SASS of $2\n")
    fake.chmod(0o755)
    monkeypatch.setattr(toolchain, "find_disassembler", lambda: [str(fake), "-c"])
    monkeypatch.setenv("JAX_DEEPGEMM_DUMP", "ptx,sass")
    kernel = jit.compile_kernel(fill())
    stem = cache_dir / "dump" / f"fill.{kernel.digest[:16]}"
    ptx = stem.with_name(stem.name + ".ptx").read_text()
    assert ".target sm_90a" in ptx
    assert ".entry fill" in ptx
    assert "\0" not in ptx
    assert "SASS" in stem.with_name(stem.name + ".sass").read_text()


def test_sass_of_a_real_disassembler(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if toolchain.find_disassembler() is None:
        pytest.skip("no nvdisasm or cuobjdump")
    monkeypatch.setenv("JAX_DEEPGEMM_DUMP", "sass")
    jit.compile_kernel(fill())
    (path,) = (cache_dir / "dump").iterdir()
    assert "EXIT" in path.read_text()


def test_dump_without_a_disassembler(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(toolchain, "find_disassembler", lambda: None)
    monkeypatch.setenv("JAX_DEEPGEMM_DUMP", "sass")
    jit.compile_kernel(fill())
    assert "pip install nvidia-cuda-nvdisasm" in caplog.text


def test_records() -> None:
    with jit.record_kernels() as outer:
        jit.compile_kernel(fill())
        with jit.record_kernels() as inner:
            jit.compile_kernel(fill(2))
    assert [source.parameters for source, _ in outer] == [(("value", 1),)]
    assert [source.parameters for source, _ in inner] == [(("value", 2),)]


# --- ahead of time --------------------------------------------------------------------------------


def test_compile_many(count: list[str]) -> None:
    sources = [fill(1), KernelSource("hopper", HOPPER), fill(2), fill(1)]
    kernels = jit.compile_many(sources, jobs=4, progress=False)
    assert [kernel.name for kernel in kernels] == ["fill", "hopper", "fill", "fill"]
    assert kernels[0] is kernels[3]
    assert kernels[0] != kernels[2]
    assert sorted(count) == ["fill", "fill", "hopper"]
    assert jit.compile_many([]) == []


@pytest.mark.parametrize("jobs", [1, 3])
def test_compile_many_raises_the_first_error(jobs: int) -> None:
    with pytest.raises(CompileError, match="kernel bad does not compile"):
        jit.compile_many([fill(1), KernelSource("bad", "?"), fill(2)], jobs=jobs)


class TwoKernels:
    def kernel_sources(self, chip: Any) -> list[KernelSource]:
        return [fill(chip.num_sms), fill(2)]


def test_precompile_problems_sources_and_functions() -> None:
    def function(x: jax.Array) -> jax.Array:
        return x + 1

    shape = jax.ShapeDtypeStruct((8,), jnp.float32)
    kernels = jit.precompile([TwoKernels(), fill(2), (jax.jit(function), shape), (function, shape)])
    assert len(kernels) == 2
    forget()
    assert all(kernel.report.from_cache for kernel in jit.precompile([TwoKernels()]))


def test_precompile_sees_kernels_of_lowering_rules() -> None:
    """A function's kernels are those that its cuda lowering asks for, in whichever thread that runs."""
    from jax.extend.core import Primitive
    from jax.interpreters import mlir

    primitive = Primitive("jit_test_copy")
    primitive.def_abstract_eval(lambda x: x)

    def lower(ctx: Any, x: Any) -> list[Any]:
        jit.compile_kernel(fill(7))
        return [x]

    mlir.register_lowering(primitive, lower, platform="cuda")
    shape = jax.ShapeDtypeStruct((8,), jnp.float32)
    for jobs in (1, 2):
        items = [(lambda x: primitive.bind(x), shape), (lambda x: primitive.bind(x) + 1, shape)]
        records = precompile_records(items, jobs=jobs)
        assert [source.parameters for source, _ in records] == [(("value", 7),)] * 2


def test_precompile_rejects_others() -> None:
    with pytest.raises(TypeError, match=r"got 3, need a problem"):
        jit.precompile([3])  # type: ignore[list-item]


# --- python -m jax_deepgemm compile ---------------------------------------------------------------


def test_shapes_file() -> None:
    text = """
# a comment
fp8_gemm_nt,4096,7168,2048
bf16_gemm_tn, 1, 8, 16, float32, 1
{"op": "fp8_gemm_nn", "m": 5, "n": 6, "k": 7, "b_block": "1x128", "accumulate": true}
k,op,m,n
7,fp8_gemm_nt,5,6
"""
    assert cli.parse_shapes(text) == [
        cli.Shape("fp8_gemm_nt", 4096, 7168, 2048),
        cli.Shape("bf16_gemm_tn", 1, 8, 16, "float32", True),
        cli.Shape("fp8_gemm_nn", 5, 6, 7, b_block="1x128", accumulate=True),
        cli.Shape("fp8_gemm_nt", 5, 6, 7),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fp4_gemm_nt,1,2,3", "op is 'fp4_gemm_nt', need fp8_gemm_ or bf16_gemm_"),
        ("fp8_gemm_nt,1,2", "k is missing"),
        ("fp8_gemm_nt,1,two,3", "n is 'two', need a whole number"),
        ("fp8_gemm_nt,1,2,3,float16", "out_dtype is 'float16', need bfloat16 or float32"),
        ("fp8_gemm_nt,1,2,3,float32,maybe", "accumulate is 'maybe'"),
        ("fp8_gemm_nt,1,2,3,float32,0,64x64", "b_block is '64x64', need 128x128 or 1x128"),
        ("fp8_gemm_nt,1,2,3,float32,0,1x128,9", "8 cells, need at most 7"),
        ('{"op": "fp8_gemm_nt", "m": 1, "n": 2, "k": 3, "size": 4}', "unknown field size"),
        ('{"op": "fp8_gemm_nt", "m": 0, "n": 2, "k": 3}', "m is missing or 0"),
        ('{"op": ', "Expecting value"),
    ],
)
def test_shapes_file_errors(line: str, message: str) -> None:
    with pytest.raises(ValueError, match="line 2: ") as error:
        cli.parse_shapes("\n" + line)
    assert message in str(error.value)


def run_command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(arguments))


def test_compile_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = KernelSource(
        "hopper", HOPPER, (("block_m", 64), ("out", jnp.dtype("float32"))), shared_memory=4096
    )
    monkeypatch.setattr(cli, "traceable", lambda shape: source)
    shapes = tmp_path / "shapes.csv"
    shapes.write_text("fp8_gemm_nt,1,2,3\nfp8_gemm_nt,1,2,4\n")
    assert run_command("--shapes", str(shapes), "--json", "--jobs", "1") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == "hopper"
    assert row["parameters"] == {"block_m": 64, "out": "float32"}
    assert row["registers"] > 0
    assert row["spill_bytes"] == row["local_bytes"] == row["static_shared_memory"] == 0
    assert row["dynamic_shared_memory"] == 4096
    assert row["compile_seconds"] > 0
    assert row["from_cache"] is False
    assert row["warnings"] == []
    forget()
    assert run_command("--shapes", str(shapes)) == 0
    out = capsys.readouterr().out
    assert "hopper" in out
    assert "disk" in out
    assert "1 kernels for 2 shapes" in out


def test_compile_command_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = tmp_path / "shapes.csv"
    assert run_command("--shapes", str(shapes)) == 2
    shapes.write_text("fp8_gemm_nt,1\n")
    assert run_command("--shapes", str(shapes)) == 2
    shapes.write_text("fp8_gemm_nt,1,2,3\n")
    monkeypatch.setattr(cli, "traceable", lambda shape: KernelSource("bad", "?"))
    assert run_command("--shapes", str(shapes)) == 1
    assert "kernel bad does not compile" in capsys.readouterr().err


def test_compile_command_says_that_nothing_is_kept(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache_dir.write_text("a file, not a directory")
    shapes = tmp_path / "shapes.csv"
    shapes.write_text("fp8_gemm_nt,1,2,3\n")
    monkeypatch.setattr(cli, "traceable", lambda shape: fill())
    assert run_command("--shapes", str(shapes)) == 1
    assert f"not all kernels are kept: {cache_dir} cannot be written" in capsys.readouterr().err


def test_import_compiles_nothing() -> None:
    script = (
        "import sys, jax_deepgemm.jit as _; print('cuda.core' in sys.modules, 'cuda.bindings' in sys.modules)"
    )
    assert python(script).communicate()[0].split() == ["False", "False"]


def test_describe_is_json() -> None:
    json.dumps(report.describe(fill(), jit.compile_kernel(fill())))
