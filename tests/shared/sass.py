"""The instructions of a compiled kernel."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import pytest

from jax_deepgemm.jit import CompiledKernel
from jax_deepgemm.jit.toolchain import find_disassembler


def disassemble(kernel: CompiledKernel) -> str:
    """Instructions and labels, a line each; skips the test where there is no nvdisasm."""
    command = find_disassembler()
    if command is None or not Path(command[0]).name.startswith("nvdisasm"):
        pytest.skip("no nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.cubin)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
