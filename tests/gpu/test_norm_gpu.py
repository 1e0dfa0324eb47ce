"""Norms on a GPU: against float64; sums to the bit; FP8 with the bits of `quantize` of the kernel's norm.

Run: pytest -m gpu tests/gpu/test_norm_gpu.py        (seconds)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm import quantize
from jax_deepgemm.ops.norm import norm_rows
from jax_deepgemm.ops.norm.problem import DTYPES, NormForm, NormProblem
from tests.shared import inference_oracle as oracle

ROWS, EPS = 101, 1e-5
WIDTHS = (1, 100, 128, 1000, 2048, 4100, 7168, 8192, 16_383, 16_384)
BF16 = "bfloat16"
FORMS = (
    NormForm("layer", True, True, True, True, scales="f32", summed=True),
    NormForm("rms", residual=True, gamma=True, summed=True),
    NormForm("rms", gamma=True, scales="ue8m0"),
    NormForm("layer"),
)


def calls() -> list[tuple[int, str, str, NormForm]]:
    found = [(cols, BF16, BF16, form) for cols, form in itertools.product(WIDTHS, FORMS)]
    return found + [
        (cols, dtype, "float32", FORMS[0]) for cols, dtype in itertools.product((259, 5120), DTYPES)
    ]


def kernels() -> Iterator[Any]:
    for cols, dtype, vectors, form in calls():
        given = form.bias or form.gamma or form.beta
        yield NormProblem(ROWS, cols, form, EPS, dtype, vectors if given else dtype)


def drawn(cols: int, dtype: str, vectors: str) -> list[np.ndarray]:
    """Rows of all magnitudes and means, one of zeros, and such as are no numbers."""
    rng = np.random.default_rng(cols)
    x = rng.standard_normal((ROWS, cols)) * 10.0 ** rng.integers(-2, 3, (ROWS, 1)) + rng.integers(0, 9)
    x[7], x[8, cols // 3], x[9, cols // 2] = 0, np.inf, np.nan
    rows = [x, rng.standard_normal((ROWS, cols))]
    given = [one.astype(jnp.dtype(dtype)) for one in rows]
    return [*given, *(rng.standard_normal(cols).astype(jnp.dtype(vectors)) for _ in range(3))]


def expected(form: NormForm, x: Any, residual: Any, bias: Any, gamma: Any, beta: Any) -> Any:
    wide = x.astype(np.float32)
    for other, on in ((residual, form.residual), (bias, form.bias)):
        wide = wide + other.astype(np.float32) if on else wide
    s = wide.astype(x.dtype)
    scale = oracle.wide(gamma) if form.gamma else 1.0
    with np.errstate(invalid="ignore"):
        if form.kind == "rms":
            return oracle.rms_norm(oracle.wide(s), scale, EPS), s
        return oracle.layer_norm(oracle.wide(s), scale, oracle.wide(beta) if form.beta else 0.0, EPS), s


def equal(got: Any, want: np.ndarray) -> None:
    """NaN where NaN is, all other bits alike: numpy takes no NaN of bfloat16 for another."""
    got, nan = np.asarray(got), np.isnan(oracle.wide(want))
    np.testing.assert_array_equal(np.isnan(oracle.wide(got)), nan)
    np.testing.assert_array_equal(got[~nan].view(np.uint8), want[~nan].view(np.uint8))


@pytest.mark.smoke
@pytest.mark.parametrize(("cols", "dtype", "vectors", "form"), calls(), ids=str)
def test_norms(cols: int, dtype: str, vectors: str, form: NormForm) -> None:
    x, residual, *rest = drawn(cols, dtype, vectors)
    flags = (form.bias, form.gamma, form.beta)
    given = [one if on else None for one, on in zip(rest, flags, strict=True)]
    options = {"kind": form.kind, "scales": form.scales, "summed": form.summed, "eps": EPS}

    def run(x: Any, residual: Any, *vectors: Any) -> Any:
        return norm_rows(x, residual, vectors, **options)

    y, *found = jax.jit(run)(*map(jnp.asarray, (x,)), residual if form.residual else None, *given)
    want, s = expected(form, x, residual, *rest)
    fine = np.isfinite(want).all(axis=1)
    assert (~fine).sum() <= 2
    np.testing.assert_array_equal(np.isfinite(oracle.wide(y)).all(axis=1), fine)
    units = 1.0 if dtype == BF16 else 2.0 if dtype == "float16" else 64.0
    oracle.close(np.asarray(y)[fine], want[fine], units)
    if form.summed:
        equal(found[-1], s)
    if form.scales:
        exact = quantize(y, scale_format=form.scales)
        np.testing.assert_array_equal(found[1], exact.scales)
        np.testing.assert_array_equal(
            np.asarray(found[0]).view(np.uint8), np.asarray(exact.values).view(np.uint8)
        )


def test_no_rows_and_equal_bits() -> None:
    x = jnp.asarray(drawn(7168, BF16, BF16)[0])
    run = jax.jit(
        lambda x: norm_rows(x, x, (None, x[0], None), kind="rms", eps=EPS, scales="f32", summed=True)
    )
    first = run(x)
    for _ in range(20):
        for one, other in zip(run(x), first, strict=True):
            np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))
    none = jax.jit(lambda x: norm_rows(x, x, (None, None, None), kind="rms", eps=EPS, summed=True))
    assert [one.shape for one in none(x[:0])] == [(0, 7168)] * 2
