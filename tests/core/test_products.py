"""The products of references: jax.lax.dot_general, under nested vmap too."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.core import products

FORMS: list[Any] = [
    ((4, 6), (5, 6), ((1,), (1,)), ((), ())),
    ((6, 4), (6, 5), ((0,), (0,)), ((), ())),
    ((3, 4, 6), (3, 6, 5), ((2, 0), (1, 0)), ((), ())),
    ((3, 6, 4), (3, 6, 5), ((1,), (1,)), ((0,), (0,))),
]
AXES = [axes for axes in itertools.product((None, 0, 1), repeat=2) if axes != (None, None)]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_as_jax_under_two_levels_of_vmap(form: Any) -> None:
    a_shape, b_shape, contracts, batch = form
    rng = np.random.default_rng(0)
    mine = functools.partial(products.dot_general, contracts=contracts, batch=batch)
    theirs = functools.partial(jax.lax.dot_general, dimension_numbers=(contracts, batch), precision="highest")
    cases, operands = [], []
    for inner, outer in itertools.product(AXES, AXES):
        arrays = []
        for shape, axes in ((a_shape, (inner[0], outer[0])), (b_shape, (inner[1], outer[1]))):
            for axis, size in zip(axes, (2, 7), strict=True):
                shape = shape if axis is None else (*shape[:axis], size, *shape[axis:])
            arrays.append(jnp.asarray(rng.integers(-3, 4, shape), jnp.float32))
        got, expected = (
            jax.eval_shape(jax.vmap(jax.vmap(product, inner), outer), *arrays) for product in (mine, theirs)
        )
        assert got.shape == expected.shape
        cases.append((inner, outer))
        operands.append(arrays)

    def numbers(product: Any) -> Any:
        """Of all cases, in one program."""
        mapped = [jax.vmap(jax.vmap(product, inner), outer) for inner, outer in cases]
        return jax.jit(lambda operands: [one(*arrays) for one, arrays in zip(mapped, operands)])(operands)

    for got, expected in zip(numbers(mine), numbers(theirs), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    "precision",
    [None, "highest", "bfloat16", "BF16_BF16_F32", ("high", "default"), jax.lax.Precision.HIGH,
     (jax.lax.Precision.HIGH, jax.lax.Precision.DEFAULT), jax.lax.DotAlgorithmPreset.BF16_BF16_F32],
    ids=str,
)  # fmt: skip
def test_takes_every_precision(precision: Any) -> None:
    x = jax.ShapeDtypeStruct((4, 6), jnp.bfloat16)
    numbers = (((1,), (1,)), ((), ()))
    mine, theirs = (
        jax.jit(product).lower(x, x).as_text().replace("theirs", "mine")
        for product in (
            lambda x, y: products.dot_general(x, y, *numbers, precision=precision),
            lambda x, y: jax.lax.dot_general(
                x, y, numbers, precision=precision, preferred_element_type=jnp.float32
            ),
        )
    )
    assert mine == theirs
