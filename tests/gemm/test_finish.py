"""What a product becomes in the epilogue of a kernel: where each number goes, and what it meets.

The device code runs on the CPU, a thread for each lane of a warp (tests/shared/native), with the sanitizers
on.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm.ops.gemm.finish import Heads

pytestmark = pytest.mark.any_version

NATIVE = Path(__file__).parents[1] / "shared" / "native"
DEVICE_CODE = Path(jax_deepgemm.__file__).parent / "include"
COLS, EACH, PAIRS, PLAIN, HOLES, HALVES = 128, 0, 1, 2, 3, 4


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("native") / "finish"
    include = [f"-I{NATIVE / 'finish_warp'}", f"-I{NATIVE / 'swiglu_warp'}", f"-I{DEVICE_CODE}"]
    flags = ["-std=c++20", "-Og", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    subprocess.run([compiler, *flags, *include, NATIVE / "finish.cc", "-o", target], check=True)
    return target


def run(program: Path, given: bytes) -> bytes:
    done = subprocess.run([program], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.mark.parametrize(
    ("kind", "n", "col", "batch"),
    [
        (EACH, 300, 128, 1),
        (EACH, 129, 0, 0),
        (PAIRS, 256, 128, 0),
        (PAIRS, 150, 128, 1),
        (PLAIN, 131, 128, 2),
        (HALVES, 256, 128, 1),
        (HALVES, 150, 128, 2),
        (HALVES, 302, 256, 0),
    ],
)
def test_every_number_meets_its_bias_and_goes_where_it_belongs(program: Path, kind, n, col, batch) -> None:
    rng = np.random.default_rng(n)
    alpha, bias, tile = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((3,), (3, n), (64, COLS))
    )
    numbers = np.asarray([kind, n, col, batch, 64, 0, 3], np.int32)
    got = run(program, b"".join(x.tobytes() for x in (numbers, alpha, bias, tile)))
    got = np.frombuffer(got, np.float32).reshape(64, -1)
    plus = np.zeros(COLS)
    if kind == HALVES:  # 64 features from col / 2 on, fewer where these are the last
        for half, of_half in enumerate(np.split(bias[batch], 2)):
            mine = of_half[col // 2 : col // 2 + COLS // 2]
            plus[half * COLS // 2 :][: mine.size] = mine
    else:
        inside = bias[batch, col : col + COLS]
        plus[: inside.size] = inside
    want = tile.astype(np.float64) * alpha[batch] + plus
    if kind == EACH:
        want = np.maximum(want, 0) ** 2
    if kind in (PAIRS, HALVES):
        gate, up = (want[:, 0::2], want[:, 1::2]) if kind == PAIRS else np.split(want, 2, axis=1)
        want = gate / (1 + np.exp(-gate)) * up
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    if kind == PLAIN:  # one rounding
        np.testing.assert_array_equal(got, want.astype(np.float32))


@pytest.mark.parametrize(("rows", "row", "col"), [(70, 0, 0), (70, 64, 128), (64, 0, 256), (5, 0, 384)])
def test_a_warp_fills_the_holes_in_front_of_its_columns(program: Path, rows, row, col) -> None:
    heads, n = Heads(128, 64, 64), 384
    numbers = np.asarray([HOLES, n, col, 0, rows, row, 1], np.int32)
    d = np.frombuffer(run(program, numbers.tobytes()), np.uint16).reshape(rows, heads.width(n))
    want = np.full_like(d, 0xAAAA)
    for first in range(col, min(col + COLS, n), 64):
        if first % heads.taken == heads.left:
            at = first + (first + heads.right) // heads.taken * heads.mid
            want[row : row + 64, at - heads.mid : at] = 0
    np.testing.assert_array_equal(d, want)
