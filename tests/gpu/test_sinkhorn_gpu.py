"""Small doubly stochastic matrices, and hyper-connections, on a GPU: against what the CPU gives.

Run: pytest -m gpu tests/gpu/test_sinkhorn_gpu.py        (seconds)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm import hyperconnection as hc
from jax_deepgemm.ops.hc_prenorm.family import HcPrenormProblem
from jax_deepgemm.ops.sinkhorn.family import SinkhornProblem

FORMS = [(1, 1, 1), (63, 2, 3), (65, 4, 20), (4096, 4, 20), (130, 8, 32)]
"""Matrices, their rows, iterations."""
TOKENS, N, D = 70, 4, 256


def kernels() -> Iterator[Any]:
    for form in FORMS:
        for kind in ("sinkhorn", "sinkhorn_gradient"):
            yield SinkhornProblem(kind, *form, 1e-6)
    yield HcPrenormProblem(TOKENS, N * (N + 2), N * D)


def on_cpu(function: Any, *given: np.ndarray) -> Any:
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.device_get(jax.jit(function)(*given))


@pytest.mark.smoke
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_matrices_and_their_gradient(form: tuple[int, int, int]) -> None:
    count, n, iterations = form
    rng = np.random.default_rng(count)
    x, by = (rng.standard_normal((count, n, n), np.float32) * 3 for _ in range(2))
    function = functools.partial(hc.sinkhorn, iterations=iterations)

    def gradient(x: jax.Array, by: jax.Array) -> jax.Array:
        return jax.vjp(function, x)[1](by)[0]

    np.testing.assert_allclose(jax.jit(function)(x), on_cpu(function, x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(gradient)(x, by), on_cpu(gradient, x, by), rtol=1e-3, atol=1e-4)
    poisoned = x.copy()
    poisoned[-1] = np.nan
    found = np.asarray(jax.jit(function)(poisoned))
    assert np.isnan(found[-1]).all()
    np.testing.assert_array_equal(found[:-1], jax.jit(function)(x)[:-1])


def step(streams: jax.Array, *parameters: jax.Array) -> jax.Array:
    x, *back = hc.pre(streams, *parameters)
    return hc.post(jnp.tanh(x), streams, *back)


@pytest.mark.smoke
def test_a_step_and_its_gradients() -> None:
    rng = np.random.default_rng(0)
    columns = N * (N + 2)
    given = (
        rng.standard_normal((TOKENS, N, D), np.float32).astype(jnp.bfloat16),
        rng.standard_normal((columns, N * D), np.float32) / 16,
        np.array([0.3, 0.5, 0.7], np.float32),
        rng.standard_normal(columns, np.float32),
    )

    def gradients(*given: jax.Array) -> Any:
        return jax.grad(lambda *a: jnp.sum(jnp.sin(step(*a).astype(jnp.float32))), (0, 1, 2, 3))(*given)

    def check(got: Any, want: Any, tolerance: float) -> None:
        got, want = (np.asarray(one).astype(np.float64) for one in (got, want))
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max()

    check(jax.jit(step)(*given), on_cpu(step, *given), 2.0**-7)
    for got, want in zip(jax.jit(gradients)(*given), on_cpu(gradients, *given), strict=True):
        check(got, want, 2e-2)  # two roundings of bfloat16, sums in another order
