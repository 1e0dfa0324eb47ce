"""Tiles of K-grouped products with scales of 1x128 and 128x128: the producer and the main loop.

Their device code runs on the CPU, a thread for each warp (tests/shared/native/k_grouped_tiles.cc), over tiles
of every length behind each other, and its sums are compared with those of the numbers.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import jax_deepgemm

pytestmark = pytest.mark.any_version

NATIVE = Path(__file__).parents[1] / "shared" / "native"
DEVICE_CODE = Path(jax_deepgemm.__file__).parent / "include"

BROKEN = {
    "scales in ascending order": (
        "fp8_loop.cuh",
        "load_shared(at + 3 * apart), ptx::load_shared(at + 2 * apart)",
        "load_shared(at), ptx::load_shared(at + 2 * apart)",
    ),
    "a group's last block whole": (
        "fp8_loop.cuh",
        "ceil_div(min(tile.k_stop, C::BLOCK_K), 32)",
        "kStepsPerBlock",
    ),
}


def run(folder: Path, *included: Path) -> subprocess.CompletedProcess[str]:
    """Of k_grouped_tiles.cc, compiled with headers from `included` first."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = folder / "tiles"
    include = [f"-I{path}" for path in (*included, NATIVE / "tiles", NATIVE / "warps", DEVICE_CODE)]
    source = NATIVE / "k_grouped_tiles.cc"
    flags = ["-std=c++20", "-O1", "-pthread", "-Wno-attributes"]
    subprocess.run([compiler, *flags, *include, source, "-o", target], check=True)
    return subprocess.run([target], capture_output=True, text=True, check=False, timeout=120)


def test_every_tile(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "every tile\n"


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_loop_is_found(what: str, tmp_path: Path) -> None:
    name, right, wrong = BROKEN[what]
    text = (DEVICE_CODE / "jax_deepgemm" / "gemm" / name).read_text()
    assert text.count(right) == 1
    changed = tmp_path / "jax_deepgemm" / "gemm" / name
    changed.parent.mkdir(parents=True)
    changed.write_text(text.replace(right, wrong))
    done = run(tmp_path, tmp_path)
    assert done.returncode == 1
    assert "tile at" in done.stderr
