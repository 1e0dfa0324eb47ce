"""The epilogue that makes a quantised SwiGLU of a tile of gate and up: where each number goes.

The device code runs on the CPU, a thread for each lane of a warp (tests/shared/native), with the sanitizers
on, and is compared with the formula. That the kernel's bits are those of `swiglu_quantize` is for
tests/gpu/test_grouped_swiglu_gpu.py.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import astuple, dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm

pytestmark = pytest.mark.any_version

NATIVE = Path(__file__).parents[1] / "shared" / "native"
DEVICE_CODE = Path(jax_deepgemm.__file__).parent / "include"
NOT_WRITTEN, NO_SCALE = 0xAA, -1.0
LEAST = np.float32(2.0**-126)


@dataclass(frozen=True)
class Case:
    """A tile of 64 rows from `first_row` on, of matrix `matrix` (masked: one for each group)."""

    rows: int
    matrices: int
    features: int
    first_row: int
    rows_end: int
    zeros_end: int
    feature: int
    matrix: int
    masked: int
    pitch: int = 0
    """Scales of a row in memory; 0: as many as there are. Others are of chains, and have a bias."""


CASES = (
    Case(70, 1, 256, 3, 67, 67, 128, 0, 0),  # all rows of the tile
    Case(70, 1, 256, 3, 20, 20, 0, 0, 0),  # others' rows follow, in the middle of a warp's
    Case(70, 1, 128, 0, 5, 64, 0, 0, 0),  # zeros follow
    Case(64, 1, 384, 16, 16, 64, 256, 0, 0),  # nothing but zeros
    Case(60, 1, 128, 0, 60, 60, 0, 0, 0),  # the last rows there are
    Case(33, 3, 256, 0, 21, 32, 128, 1, 1),  # the second of three groups
    Case(33, 3, 256, 0, 33, 33, 0, 2, 1),
    Case(70, 1, 384, 3, 40, 67, 256, 0, 0, 4),
    Case(33, 3, 256, 0, 21, 32, 128, 1, 1, 4),
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("native") / "swiglu_epilogue"
    include = [f"-I{NATIVE / 'swiglu_warp'}", f"-I{DEVICE_CODE}"]
    flags = ["-std=c++20", "-Og", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    subprocess.run([compiler, *flags, *include, NATIVE / "swiglu_epilogue.cc", "-o", target], check=True)
    return target


def drawn(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """h of the tile, of which rows that do not count are NaN, the weights, likewise, and the biases."""
    rng = np.random.default_rng(0)
    h = rng.standard_normal((64, 256)).astype(np.float32) * 10 ** rng.uniform(-3, 2, (64, 1)).astype(
        np.float32
    )
    h[1] = 0
    h[2, [5, 40]] = np.nan, np.inf  # up is finite: act is NaN, and infinite
    h[case.rows_end - case.first_row :] = np.nan
    weights = rng.standard_normal((case.matrices, case.rows)).astype(np.float32)
    weights[case.matrix, case.rows_end :] = np.nan
    return h, weights, rng.standard_normal((case.matrices, 2, case.features)).astype(np.float32)


def wanted(case: Case, h: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """act of the rows of the tile that are written, and their scales."""
    count, real = case.zeros_end - case.first_row, max(case.rows_end - case.first_row, 0)
    stored = h[:count].astype(jnp.bfloat16).astype(np.float32)
    if case.pitch:
        both = bias[case.matrix, :, case.feature : case.feature + 128].reshape(256)
        stored = (stored + both).astype(jnp.bfloat16).astype(np.float32)
    gate, up = stored[:, :128], stored[:, 128:]
    rows = weights[case.matrix, case.first_row : case.zeros_end, None]
    with np.errstate(all="ignore"):
        act = gate / (1 + np.exp(-gate)) * up * rows
    act[real:] = 0
    amax = np.max(np.where(np.isfinite(act), np.abs(act), 0), axis=1, keepdims=True, initial=0)
    return act, np.maximum(amax / 448, LEAST)


def test_every_number_goes_where_it_belongs(program: Path) -> None:
    given = b""
    for case in CASES:
        numbers = (np.asarray(astuple(case), np.int32), *drawn(case))
        given += b"".join(one.tobytes() for one in numbers)
    done = subprocess.run([program], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    left = done.stdout
    for case in CASES:
        shape = (case.matrices, case.rows, case.features)
        size, blocks = int(np.prod(shape)), case.pitch or case.features // 128
        end = size + 4 * case.matrices * case.rows * blocks
        values = np.frombuffer(left[:size], np.uint8).reshape(shape).copy()
        scales = np.frombuffer(left[size:end], np.float32).reshape(*shape[:2], blocks).copy()
        left = left[end:]
        check(case, values, scales)
    assert left == b""


def check(case: Case, values: np.ndarray, scales: np.ndarray) -> None:
    act, least = wanted(case, *drawn(case))
    where = np.s_[case.matrix, case.first_row : case.first_row + len(act)]
    features = np.s_[case.feature : case.feature + 128]
    got = values[where][:, features].view(jnp.float8_e4m3fn).astype(np.float32)
    mine = scales[where][:, case.feature // 128, None]
    np.testing.assert_allclose(mine, least, rtol=1e-5, err_msg=str(case))
    finite = np.isfinite(act)
    assert (np.isnan(got) == ~finite).all(), case
    error = np.abs(got * mine - act)[finite]
    subnormal = 0.51 * 2.0**-9 * np.broadcast_to(mine, act.shape)
    assert (error <= (np.abs(act) / 16 + subnormal)[finite]).all(), case
    values[where][:, features], scales[where][:, case.feature // 128] = NOT_WRITTEN, NO_SCALE
    assert (values == NOT_WRITTEN).all(), case
    assert (scales == NO_SCALE).all(), case
