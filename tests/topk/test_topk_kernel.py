"""The kernel that finds the largest numbers of rows, without a GPU.

The device code itself runs on the CPU, one thread for each thread of each block (tests/shared/native), with
the thread sanitizer on, which finds a barrier that is missing, and is compared with NumPy's sort.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm.core.chip import H200
from jax_deepgemm.ops.topk.family import FAMILY
from jax_deepgemm.ops.topk.problem import DTYPES, TopkProblem
from tests.shared import topk_oracle
from tests.shared.device_code import fields_of_concept, fields_of_struct

pytestmark = pytest.mark.any_version

NATIVE = Path(__file__).parents[1] / "shared" / "native"
DEVICE_CODE = Path(jax_deepgemm.__file__).parent / "include"
HEADERS = Path("jax_deepgemm/topk")
BROKEN = {
    "candidates are counted before all are there": (
        "topk.cuh",
        "meet<C>();\n  u32 before",
        "u32 before",
    ),
    "bins are read while they are counted": (
        "order.cuh",
        "__syncthreads();\n    look<false>(b, wanted);",
        "look<false>(b, wanted);",
    ),
    "a network that crosses warps": ("order.cuh", "stride > 32 || ", "stride > 64 || "),
}


class Case(NamedTuple):
    """One launch."""

    x: np.ndarray
    k: int
    pieces: int = 1
    windows: bool = False
    values: bool = True
    sample: int = 64
    offset: int = 0
    seed: int = 0

    @property
    def by_index(self) -> bool:  # as topk.cc has the flags
        return not (self.windows and self.values)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        m, n = self.x.shape
        if not self.windows:
            return np.zeros(m, np.int32), np.full(m, n, np.int32)
        return topk_oracle.windows(m, n, self.seed)

    def numbers(self) -> np.ndarray:
        m, n = self.x.shape
        head = [
            DTYPES.index(self.x.dtype.name), self.pieces, self.windows, self.values, self.by_index, m, n,
            self.k, self.sample, self.offset,
        ]  # fmt: skip
        bits = self.x.view(f"uint{8 * self.x.dtype.itemsize}").astype(np.uint32).view(np.int32)
        return np.concatenate([np.array(head, np.int32), *self.bounds(), bits.reshape(-1)])

    def expected(self) -> np.ndarray:
        indices = topk_oracle.topk(self.x, self.k, *self.bounds(), by_index=self.by_index)
        found = [indices.reshape(-1)]
        if self.values:
            bits = topk_oracle.values(self.x, indices).view(f"uint{8 * self.x.dtype.itemsize}")
            found.append(bits.astype(np.uint32).view(np.int32).reshape(-1))
        return np.concatenate(found)


def hard(n: int, dtype: str, seed: int, kinds: tuple[str, ...] = topk_oracle.HARD) -> np.ndarray:
    with np.errstate(over="ignore"):
        return topk_oracle.rows(n, seed, kinds).astype(jnp.dtype(dtype))


def build(folder: Path, *included: Path) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = folder / "topk"
    include = [f"-I{path}" for path in (*included, NATIVE / "blocks", DEVICE_CODE)]
    flags = ["-std=c++20", "-Og", "-pthread", "-fsanitize=thread", "-Wno-unknown-pragmas"]
    flags += ["-DONE"] if included else []
    subprocess.run([compiler, *flags, *include, NATIVE / "topk.cc", "-o", target], check=True)
    return target


def problems(cases: list[Case], program: Path) -> list[str]:
    """What is wrong with the program's results: races, and what NumPy finds otherwise."""
    at = program.with_suffix(".bin")
    np.concatenate([case.numbers() for case in cases]).tofile(at)
    done = subprocess.run([program, at], capture_output=True, text=True, check=False, timeout=100)
    if done.returncode:
        return [done.stderr]
    found = []
    for case, line in zip(cases, done.stdout.splitlines(), strict=True):
        got, want = np.array(line.split(), np.int64).astype(np.int32), case.expected()
        if not np.array_equal(got, want):
            rows = np.flatnonzero((got != want)[: case.x.shape[0] * case.k].reshape(-1, case.k).any(1))
            found.append(f"{case._replace(x=None)} {case.x.shape} {case.x.dtype}: rows {rows}")
    return found


def test_any_row(tmp_path: Path) -> None:
    """Rows that fit the list, and those that need a sample, which is wrong for some."""
    few = ("special", "blocks", "two values", "normal")
    cases = [
        Case(hard(n, dtype, i, kinds), k, pieces, windows, values, offset=i % 4, seed=i)
        for i, (n, k, dtype, pieces, windows, values, kinds) in enumerate(
            [
                (1, 1, "float32", 1, False, True, few[:1]),
                (100, 7, "float32", 1, True, True, few),
                (300, 20, "float32", 1, True, False, topk_oracle.HARD),
                (300, 33, "float16", 1, False, True, topk_oracle.HARD),
                (128, 200, "bfloat16", 4, True, True, few),
                (301, 33, "float32", 4, False, True, few),
                (600, 64, "float32", 4, True, False, few),
            ]
        )
    ]
    assert problems(cases, build(tmp_path)) == []


@pytest.mark.parametrize("what", BROKEN)
def test_a_missing_barrier_is_found(what: str, tmp_path: Path) -> None:
    header, right, wrong = BROKEN[what]
    text = (DEVICE_CODE / HEADERS / header).read_text()
    assert text.count(right) == 1
    shutil.copytree(DEVICE_CODE / HEADERS, tmp_path / HEADERS)
    (tmp_path / HEADERS / header).write_text(text.replace(right, wrong))
    long, short = (hard(n, "float32", 0, (kind,)) for n, kind in ((500, "normal"), (128, "two scales")))
    cases = [Case(long, 100), Case(long, 100, 4), *[Case(short, 100)] * 3]
    assert problems(cases, build(tmp_path, tmp_path))


def test_the_text_gives_what_device_code_asks_for() -> None:
    [source] = FAMILY.sources(TopkProblem(64, 65536, 2048), H200)
    wanted = fields_of_concept("topk/order.cuh", "TopkConfig")
    assert fields_of_struct(source.text, "Config") == sorted(wanted)
