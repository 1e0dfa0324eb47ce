"""A batch for functions that know none: the results of jax.vmap, in one call where that is possible."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.core.batch import fold, lies_along_rows, without_batch
from jax_deepgemm.core.sharding import ShardingRule

PRODUCT = ShardingRule.parse("m k, k n -> m n", reduces=("k",))
ADDED = ShardingRule.parse("m k, k n, m n -> m n", reduces=("k",), addend=2)
SCALED = ShardingRule.parse("r c -> r c, rb cb", blocks={"rb": ("r", 2), "cb": ("c", 2)})
SUMS = ShardingRule.parse("m k -> m", reduces=("k",))
TURNED = ShardingRule.parse("k m -> m k")

FUNCTIONS: dict[str, tuple[ShardingRule, Any, tuple[tuple[int, ...], ...]]] = {
    "product": (PRODUCT, lambda a, b: [a @ b], ((4, 6), (6, 8))),
    "product and sum": (ADDED, lambda a, b, c: [a @ b + c], ((4, 6), (6, 8), (4, 8))),
    "blocks": (SCALED, lambda x: [2 * x, x.reshape(2, 2, 3, 2).max((1, 3))], ((4, 6),)),
    "sums": (SUMS, lambda x: [x.sum(1)], ((4, 6),)),
    "turned": (TURNED, lambda x: [x.T], ((6, 4),)),
}
CASES = [
    ("product", (True, False), True),
    ("product", (True, True), False),
    ("product", (False, True), False),
    ("product and sum", (True, False, True), True),
    ("product and sum", (True, False, False), False),
    ("product and sum", (False, False, True), False),
    ("blocks", (True,), False),
    ("sums", (True,), True),
    ("turned", (True,), False),
]


@pytest.mark.parametrize(("name", "carried", "together"), CASES)
@pytest.mark.parametrize("local", [True, False])
def test_results_are_those_of_vmap(name: str, carried: tuple[bool, ...], together: bool, local: bool) -> None:
    rule, function, shapes = FUNCTIONS[name]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [
        jax.random.normal(key, (5, *shape) if on else shape)
        for key, shape, on in zip(keys, shapes, carried, strict=True)
    ]
    seen: list[tuple[int, ...]] = []

    def run(*given: jax.Array) -> list[jax.Array]:
        seen.append(given[carried.index(True)].shape)
        return function(*given)

    got = without_batch(rule, run, arrays, carried, local=local)
    want = jax.vmap(function, tuple(0 if on else None for on in carried))(*arrays)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert lies_along_rows(rule, carried) == together
    rows, *rest = shapes[carried.index(True)]
    assert seen == [(5 * rows, *rest) if together and local else (rows, *rest)]


def test_levels_become_one_dimension() -> None:
    x, y, z = jnp.arange(24.0).reshape(2, 3, 4), jnp.arange(12.0).reshape(3, 4), jnp.arange(4.0)
    (a, b, c), carried = fold([x, y, z], ((True, False, False), (True, True, False)))
    assert carried == (True, True, False)
    np.testing.assert_array_equal(a, x.reshape(6, 4))
    np.testing.assert_array_equal(b, np.tile(y, (2, 1)))
    assert c is z
