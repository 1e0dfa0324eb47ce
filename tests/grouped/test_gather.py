"""The producer that copies rows which an index names: its device code on the CPU, every thread of it
(tests/shared/native/gather.cc)."""

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
    "any row": ("gather.cuh", "static_cast<u32>(found) < static_cast<u32>(rows)", "found != -1", "beside"),
    "the next group's rows": (
        "gather.cuh",
        "place < end ? __ldg(index + place) : -1",
        "__ldg(index + place)",
        "",
    ),
    "an arrival before the copies": (
        "producer.cuh",
        "ptx::copy_async_arrive(ring.full());",
        "ptx::mbarrier_arrive(ring.full());",
        "values of the tile",
    ),
}


def run(folder: Path, *included: Path) -> subprocess.CompletedProcess[str]:
    """Of gather.cc, compiled with headers from `included` first."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = folder / "gather"
    folders = (*included, *(NATIVE / name for name in ("tiles", "warps")), DEVICE_CODE)
    include = [f"-I{path}" for path in folders]
    flags = ["-std=c++20", "-O1", "-pthread", "-Wno-attributes"]
    subprocess.run([compiler, *flags, *include, NATIVE / "gather.cc", "-o", target], check=True)
    return subprocess.run([target], capture_output=True, text=True, check=False, timeout=120)


def test_every_slot(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "every slot\n"


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_producer_is_found(what: str, tmp_path: Path) -> None:
    name, right, wrong, said = BROKEN[what]
    text = (DEVICE_CODE / "jax_deepgemm" / "gemm" / name).read_text()
    assert text.count(right) == 1
    changed = tmp_path / "jax_deepgemm" / "gemm" / name
    changed.parent.mkdir(parents=True)
    changed.write_text(text.replace(right, wrong))
    done = run(tmp_path, tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
