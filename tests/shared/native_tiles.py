"""Programs of native/ that run device code with a thread of a CPU for each warp, or for each thread."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

import jax_deepgemm

NATIVE = Path(__file__).parent / "native"
DEVICE_CODE = Path(jax_deepgemm.__file__).parent / "include"


def run(source: str, folder: Path, included: Sequence[Path]) -> subprocess.CompletedProcess[str]:
    """Of native/`source`, compiled into `folder` with headers from `included` first."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = folder / Path(source).stem
    include = [f"-I{path}" for path in (*included, NATIVE / "tiles", NATIVE / "warps", DEVICE_CODE)]
    flags = ["-std=c++20", "-O1", "-pthread", "-Wno-attributes"]
    subprocess.run([compiler, *flags, *include, NATIVE / source, "-o", target], check=True)
    return subprocess.run([target], capture_output=True, text=True, check=False, timeout=120)
