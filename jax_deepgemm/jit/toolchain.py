"""Which compiler, which settings: the environment of compilation and cache.

| variable                     | default                  | effect                                       |
|------------------------------|--------------------------|----------------------------------------------|
| JAX_DEEPGEMM_CACHE_DIR       | ~/.cache/jax_deepgemm    | where compiled kernels live                  |
| JAX_DEEPGEMM_COMPILER        | nvrtc                    | nvrtc (library, no toolkit needed) or nvcc   |
| JAX_DEEPGEMM_NVCC            | CUDA_HOME/bin, then PATH | the nvcc to run                              |
| JAX_DEEPGEMM_CPP_STANDARD    | 20                       | of the kernels' C++: 20 or 23                |
| JAX_DEEPGEMM_DEBUG           | 0                        | all that PRINT_ and VERBOSE print, and       |
|                              |                          | each launch with its parameters              |
| JAX_DEEPGEMM_LOG             | unset                    | debug, info, warning or error, to stderr     |
| JAX_DEEPGEMM_PRINT_CONFIGS   | 0                        | print each problem with its configuration    |
| JAX_DEEPGEMM_PRINT_COMMAND   | 0                        | print each compiler command                  |
| JAX_DEEPGEMM_PTXAS_VERBOSE   | 0                        | print what ptxas -v says of each kernel      |
| JAX_DEEPGEMM_PTXAS_CHECK     | 0                        | error on spills, local memory or C75xx notes |
| JAX_DEEPGEMM_DUMP            | unset                    | ptx, sass or ptx,sass: to CACHE_DIR/dump     |
| JAX_DEEPGEMM_LINEINFO        | 0                        | line numbers in the cubin, for profilers     |
| JAX_DEEPGEMM_PRINT_LOAD_TIME | 0                        | print how long each kernel took from disk    |
| JAX_DEEPGEMM_TUNING_FILE     | CACHE_DIR/tuning         | measured configurations: a file, or off      |
| JAX_DEEPGEMM_NVIDIA_TOOLS    | 0                        | bench_kineto leaves the profiler to others   |

Switches take 0 or 1. Variables are read at each compilation, so a change holds from the next kernel on;
JAX_DEEPGEMM_LOG is read at import.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_deepgemm.log import LEVELS
from jax_deepgemm.log import logger as logger

INCLUDE_DIR = Path(__file__).resolve().parent.parent / "include"
PREFIX = "JAX_DEEPGEMM_"
COMPILERS = ("nvrtc", "nvcc")
DUMPS = ("ptx", "sass")
STANDARDS = ("20", "23")


class CompilerNotFoundError(RuntimeError):
    """No CUDA compiler where one was looked for; the message says how to get one."""


@dataclass(frozen=True)
class Environment:
    """The environment, read once per compilation; fields are the variables of the module's table."""

    cache_dir: Path
    compiler: str = "nvrtc"
    nvcc: str | None = None
    cpp_standard: str = "20"
    debug: bool = False
    print_configs: bool = False
    print_command: bool = False
    ptxas_verbose: bool = False
    ptxas_check: bool = False
    dump: tuple[str, ...] = ()
    lineinfo: bool = False
    log: str | None = None
    print_load_time: bool = False
    nvidia_tools: bool = False


@dataclass(frozen=True)
class Toolchain:
    """A compiler that was found: "nvrtc" or "nvcc", its version, and where it is."""

    kind: str
    version: str
    path: str

    def __str__(self) -> str:
        return f"{self.kind} {self.version} ({self.path})"


def read_settings() -> Environment:
    """The settings of this moment; a value outside its rule is a ValueError that names the variable."""
    debug = _switch("DEBUG")
    return Environment(
        cache_dir=cache_dir(),
        compiler=_choice("COMPILER", COMPILERS) or "nvrtc",
        nvcc=os.environ.get(PREFIX + "NVCC") or None,
        cpp_standard=_choice("CPP_STANDARD", STANDARDS) or STANDARDS[0],
        debug=debug,
        print_configs=_switch("PRINT_CONFIGS") or debug,
        print_command=_switch("PRINT_COMMAND") or debug,
        ptxas_verbose=_switch("PTXAS_VERBOSE") or debug,
        ptxas_check=_switch("PTXAS_CHECK"),
        dump=_choices("DUMP", DUMPS),
        lineinfo=_switch("LINEINFO"),
        log=_choice("LOG", LEVELS),
        print_load_time=_switch("PRINT_LOAD_TIME") or debug,
        nvidia_tools=_switch("NVIDIA_TOOLS"),
    )


def cache_dir() -> Path:
    """The directory of compiled kernels; ValueError where no home directory is known."""
    given = os.environ.get(PREFIX + "CACHE_DIR")
    try:
        return Path(given or "~/.cache/jax_deepgemm").expanduser()
    except RuntimeError:  # no HOME, and no entry of this user in the system's list
        way_out = f"{PREFIX}CACHE_DIR is {given!r}" if given else f"set {PREFIX}CACHE_DIR to a folder"
        raise ValueError(f"no home directory is known for the kernel cache; {way_out}.") from None


def say(text: str) -> None:
    """Prints a diagnostic that the user switched on."""
    print(f"jax_deepgemm: {text}", file=sys.stderr, flush=True)


_IMPORTING = threading.Lock()


def import_cuda_core() -> Any:
    """cuda.core, imported at the first compilation and not before.

    One thread imports: others would see `cuda.core` half made (its modules import each other).
    """
    try:
        with _IMPORTING:
            import cuda.core
            import cuda.core.utils
            from cuda.core.utils import FileStreamProgramCache  # noqa: F401 - new in 1.0
    except ImportError as error:
        raise CompilerNotFoundError(
            f"jax_deepgemm compiles kernels through cuda-core >= 1.0, which cannot be imported ({error}). "
            'Install it with NVRTC:  pip install "cuda-core[cu12]>=1"  or  pip install "cuda-core[cu13]>=1", '
            "the one of your jax (jax[cuda12] or jax[cuda13])."
        ) from error
    return cuda.core


def find_toolchain(settings: Environment) -> Toolchain:
    """The compiler that the settings ask for, or CompilerNotFoundError."""
    if settings.compiler == "nvrtc":
        return _find_nvrtc()
    path = find_nvcc(settings)
    return Toolchain("nvcc", _nvcc_version(path), path)


@functools.lru_cache(maxsize=1)
def _find_nvrtc() -> Toolchain:
    import_cuda_core()
    try:
        from cuda.bindings import nvrtc
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("nvrtc").abs_path
        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # pathfinder and bindings each have their own family of errors
        raise CompilerNotFoundError(
            f"NVRTC cannot be loaded ({error}). Install it: pip install nvidia-cuda-nvrtc-cu12  for CUDA 12, "
            "pip install nvidia-cuda-nvrtc  for CUDA 13; or set JAX_DEEPGEMM_COMPILER=nvcc to use a toolkit."
        ) from error
    if int(status):
        raise CompilerNotFoundError(f"NVRTC at {path} does not tell its version: {status!r}. Reinstall it.")
    return Toolchain("nvrtc", f"{major}.{minor}", str(path))


def find_nvcc(settings: Environment) -> str:
    """nvcc by JAX_DEEPGEMM_NVCC, then CUDA_HOME or CUDA_PATH, then PATH, then /usr/local/cuda."""
    if settings.nvcc:
        candidates = [settings.nvcc]
    else:
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
        candidates = [f"{home}/bin/nvcc" for home in homes if home] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if path := shutil.which(candidate):
            return path
    raise CompilerNotFoundError(
        f"JAX_DEEPGEMM_COMPILER=nvcc, but no nvcc was found; looked for {', '.join(candidates)}. "
        "Set JAX_DEEPGEMM_NVCC to its path, or JAX_DEEPGEMM_COMPILER=nvrtc, which needs no toolkit."
    )


def find_disassembler() -> list[str] | None:
    """The command that turns a cubin into SASS text: of the wheels, the toolkit or PATH; None without one."""
    from cuda.pathfinder import find_nvidia_binary_utility

    for tool, flags in (("nvdisasm", ["-c"]), ("cuobjdump", ["-sass"])):
        if found := shutil.which(tool) or find_nvidia_binary_utility(tool):
            return [found, *flags]
    return None


@functools.lru_cache(maxsize=8)
def _nvcc_version(path: str) -> str:
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompilerNotFoundError(
            f"{path} --version fails ({error}). Set JAX_DEEPGEMM_NVCC to a working nvcc."
        ) from error
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found.group(1) if found else text.strip()


def _switch(name: str) -> bool:
    value = os.environ.get(PREFIX + name, "") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{PREFIX}{name} is {value!r}, need 0 or 1.")
    return value == "1"


def _choices(name: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    values = tuple(
        part.strip().lower() for part in os.environ.get(PREFIX + name, "").split(",") if part.strip()
    )
    for value in values:
        if value not in allowed:
            raise ValueError(f"{PREFIX}{name} is {value!r}, need one of {', '.join(allowed)}.")
    return values


def _choice(name: str, allowed: tuple[str, ...]) -> str | None:
    values = _choices(name, allowed)
    if len(values) > 1:
        raise ValueError(f"{PREFIX}{name} is {','.join(values)!r}, need one of {', '.join(allowed)}.")
    return values[0] if values else None
