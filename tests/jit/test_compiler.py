"""The compiler and its diagnostics. Everything here runs without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jax_deepgemm import bf16_gemm_nt, config, jit
from jax_deepgemm.jit import CompileError, KernelSource, toolchain
from jax_deepgemm.jit.report import parse_log
from tests.shared.jit_kernels import HOPPER, IGNORED_SETMAXNREG, LOCAL_MEMORY, fill, forget

# --- compiling ---


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


# --- nvcc ---


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
        ("CPP_STANDARD", "17", "20, 23"),
        ("DEBUG", "2", "0 or 1"),
        ("NVIDIA_TOOLS", "on", "0 or 1"),
    ],
)
def test_settings_are_checked(name: str, value: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"JAX_DEEPGEMM_{name}", value)
    with pytest.raises(ValueError, match=f"JAX_DEEPGEMM_{name} is .* need .*{rule}"):
        toolchain.read_settings()


def test_every_variable_is_in_the_table() -> None:
    lines = (toolchain.__doc__ or "").splitlines()
    documented = {line.split()[1] for line in lines if line.startswith("| JAX")}
    fields = {toolchain.PREFIX + name.upper() for name in toolchain.Environment.__dataclass_fields__}
    assert documented == fields | {config.TUNING_FILE}


def test_log_goes_to_stderr_from_its_level_on() -> None:
    script = (
        "import logging, jax_deepgemm; log = logging.getLogger('jax_deepgemm'); log.info('a'); log.debug('b')"
    )
    environment = {**os.environ, "JAX_DEEPGEMM_LOG": "info"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, text=True, capture_output=True, check=True
    )
    assert [line for line in done.stderr.splitlines() if "jax_deepgemm" in line] == ["jax_deepgemm: INFO: a"]


# --- diagnostics ---


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


def test_debug_is_every_print(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("JAX_DEEPGEMM_DEBUG", "1")
    settings = toolchain.read_settings()
    assert settings.print_configs
    assert settings.print_command
    assert settings.ptxas_verbose
    assert settings.print_load_time
    x = jax.ShapeDtypeStruct((16, 64), jnp.bfloat16)
    jax.jit(lambda x: bf16_gemm_nt(x, x)).trace(x).lower(lowering_platforms=("cuda",))
    printed = capfd.readouterr().err
    for part in (
        "bf16xbf16 nt m=16 n=16 k=64 -> bfloat16: ",
        "jax_deepgemm: nvrtc -arch=sm_90a",
        "ptxas info    : Used ",
        "\n  launch jdg_sm90_bf16_nt_",
        "\n    TensorMap(buffer=Operand(index=0, byte_offset=0), dtype='bfloat16', dims=(64, 16, 1)",
    ):
        assert part in printed


def test_standard(
    monkeypatch: pytest.MonkeyPatch, count: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    text = 'extern "C" __global__ void f(long* x) { *x = __cplusplus; }'
    digests = set()
    for standard in ("", "20", "23"):
        monkeypatch.setenv("JAX_DEEPGEMM_CPP_STANDARD", standard)
        monkeypatch.setenv("JAX_DEEPGEMM_PRINT_COMMAND", "1")
        digests.add(jit.compile_kernel(KernelSource("f", text)).digest)
    assert count == ["f", "f"]
    assert len(digests) == 2
    commands = capfd.readouterr().err
    assert "--std=c++20" in commands
    assert "--std=c++23" in commands


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
