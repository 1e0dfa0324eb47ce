"""The kernels of norms without a GPU: their own source on a CPU, registers, plans."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm import quantize
from jax_deepgemm.core.chip import H200
from jax_deepgemm.ops.norm import kernels
from jax_deepgemm.ops.norm.family import FAMILY
from jax_deepgemm.ops.norm.problem import DTYPES, MOST_FEATURES, NormForm, NormProblem
from tests.shared import inference_oracle as oracle
from tests.shared import native_kernels
from tests.shared.native_kernels import NativeCall

pytestmark = pytest.mark.any_version

BF16, F32 = "bfloat16", "float32"
ALL = NormForm("layer", True, True, True, True, scales="f32", summed=True)
RMS = NormForm("rms", residual=True, gamma=True, summed=True)
ALONE = NormForm("rms", normed=False, scales="ue8m0")
PROBLEMS = [
    NormProblem(5, 1000, ALL, 1e-5),
    NormProblem(3, 259, ALL, 1e-5, F32, F32),
    NormProblem(2, 128, RMS, 1e-3, BF16, F32),
    NormProblem(6, 400, ALONE, 1e-6),
    NormProblem(2, 77, dataclasses.replace(ALONE, kind="layer"), 1e-6),
]
MAGNITUDE = 30.0
"""Of the mean, in deviations: the variance is of differences."""


def drawn(p: NormProblem) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {"x": rng.standard_normal((p.rows, p.cols)).astype(np.float32) + MAGNITUDE}
    found["residual"] = rng.standard_normal((p.rows, p.cols)).astype(np.float32) / 3
    for name in ("bias", "gamma", "beta"):
        found[name] = rng.standard_normal(p.cols).astype(np.float32)
    kinds = dict.fromkeys(("x", "residual"), p.dtype) | dict.fromkeys(("bias", "gamma", "beta"), p.vectors)
    return {name: x.astype(jnp.dtype(kinds[name])) for name, x in found.items()}


def normed(p: NormProblem, given: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The norm in float64, and the sum in the type of x."""
    wide = given["x"].astype(np.float32)
    for name in ("residual", "bias"):
        wide = wide + given[name].astype(np.float32) if getattr(p.form, name) else wide
    s = wide.astype(given["x"].dtype)
    gamma = oracle.wide(given["gamma"]) if p.form.gamma else 1.0
    if p.form.kind == "rms":
        return oracle.rms_norm(oracle.wide(s), gamma, p.eps), s
    beta = oracle.wide(given["beta"]) if p.form.beta else 0.0
    return oracle.layer_norm(oracle.wide(s), gamma, beta, p.eps), s


def results(p: NormProblem) -> list[np.ndarray]:
    row = np.full((p.rows, p.cols), np.nan, jnp.dtype(p.dtype))
    values = np.full((p.rows, p.cols), np.nan, jnp.float8_e4m3fn)
    fp8 = [values, np.full((p.rows, -(-p.cols // 128)), np.nan, np.float32)]
    return [row] * p.form.normed + fp8 * bool(p.form.scales) + [row] * p.form.summed


def call(p: NormProblem, given: dict[str, np.ndarray]) -> NativeCall:
    names = [name for name in ("residual", "bias", "gamma", "beta") if getattr(p.form, name)]
    operands = [given[name] for name in ("x", *names)]
    return NativeCall(kernels.kernel_source(p), FAMILY.plan(p, H200, {}), operands, results(p))


def test_the_kernels_themselves_on_a_cpu(tmp_path: Path) -> None:
    """Norms as in float64, sums to the bit; FP8 has the bits that `quantize` makes of the kernel's norm, or,
    where that is no result, is within a step of it."""
    pytest.importorskip("cuda.core")
    given = [drawn(p) for p in PROBLEMS]
    found = native_kernels.run(tmp_path, [*map(call, PROBLEMS, given)])
    for p, operands, got in zip(PROBLEMS, given, found, strict=True):
        want, s = normed(p, operands)
        if p.form.summed:
            np.testing.assert_array_equal(got.pop(), s)
        if p.form.normed:
            oracle.close(got[0], want, 1 if p.dtype == BF16 else 8)
        if p.form.scales:
            values, scales = got[-2:]
            y = jnp.asarray(got[0] if p.form.normed else want.astype(jnp.dtype(p.dtype)))
            exact = quantize(y, scale_format=p.form.scales)
            if p.form.normed:
                np.testing.assert_array_equal(scales, exact.scales)
                np.testing.assert_array_equal(values.view(np.uint8), np.asarray(exact.values).view(np.uint8))
            else:
                np.testing.assert_array_equal(scales, exact.scales)
                apart = oracle.wide(values) - oracle.wide(exact.values)
                assert np.abs(apart).max() <= 32
                assert np.mean(apart != 0) < 0.02


def test_what_is_no_number_is_its_row_s_alone(tmp_path: Path) -> None:
    """Also in FP8, where it counts in no scale, and a row of zeros without eps is NaN as in jnp."""
    pytest.importorskip("cuda.core")
    p = NormProblem(4, 200, dataclasses.replace(ALONE, normed=True), 0.0)
    x = drawn(p) | {}
    x["x"][0, 3], x["x"][1, 150], x["x"][2] = np.nan, np.inf, 0
    ((y, values, scales),) = native_kernels.run(tmp_path, [call(p, x)])
    assert np.isnan(oracle.wide(y)[[0, 2]]).all()
    assert np.isnan(oracle.wide(y)[1]).sum() == 1
    assert np.isfinite(oracle.wide(y)[3]).all()
    exact = quantize(jnp.asarray(y), scale_format="ue8m0")
    np.testing.assert_array_equal(scales, exact.scales)
    got, want = oracle.wide(values), oracle.wide(exact.values)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plans(dtype: str) -> None:
    """Each compiles without spills; a grid's threads reach every number."""
    pytest.importorskip("cuda.core")
    shapes = {BF16: (4096, 7168, 8192), "float16": (MOST_FEATURES,), F32: (MOST_FEATURES, 8001)}
    forms = (ALL, RMS) if dtype == BF16 else (ALL,)
    for cols, form in itertools.product(shapes[dtype], forms):
        p = NormProblem(1001, cols, form, 1e-5, dtype, dtype)
        (launch,) = FAMILY.plan(p, H200, {}).steps
        cut = kernels.cut_of(cols)
        assert not launch.kernel.report.problems()
        assert launch.kernel.report.registers * launch.block * (kernels.resident(p) // launch.block) <= 65_536
        assert launch.block == cut.threads <= 1024
        assert cut.lanes * cut.chunks * 8 >= cols
        assert launch.grid[0] * cut.rows >= p.rows


def test_every_gpu_since_ampere_has_them() -> None:
    pytest.importorskip("cuda.core")
    for arch in ("80", "89", "120a"):
        chip = dataclasses.replace(H200, arch=arch)
        assert not FAMILY.plan(PROBLEMS[0], chip, {}).steps[-1].kernel.report.problems()


def test_what_cannot_run() -> None:
    with pytest.raises(ValueError, match="rows have 16385 numbers, at most 16384"):
        FAMILY.choose(NormProblem(1, MOST_FEATURES + 1, ALL), H200)
