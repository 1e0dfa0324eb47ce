"""The plan of a dispatch as an op: against a loop over copies, under every transformation, of any sizes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from jax.sharding import PartitionSpec as P

from jax_deepgemm import export_checks
from jax_deepgemm.ops.dispatch import api
from jax_deepgemm.ops.dispatch.api import plan_copies
from jax_deepgemm.ops.dispatch.op import PLAN
from tests.shared import dispatch_oracle, op_checks
from tests.shared.moe_oracle import random_ids
from tests.shared.op_checks import OpCase, Shard

EXPERTS, T, K = 8, 16, 2
plan = jax.jit(plan_copies, static_argnums=(1, 2))


def same(got: Any, ids: np.ndarray, experts: int, capacity: int | None) -> None:
    for one, other in zip(got, dispatch_oracle.plan(ids, experts, capacity), strict=True):
        assert one.dtype == jnp.int32
        np.testing.assert_array_equal(one, other)


@st.composite
def routings(draw: st.DrawFn) -> tuple[np.ndarray, int, int | None]:
    """ids, experts, capacity: few shapes, as each is compiled; any load, any dropped copies."""
    shape, experts = draw(st.sampled_from([((1, 1), 1), ((9, 4), 5), ((40, 3), 64), ((30, 8), 2048)]))
    capacity = draw(st.sampled_from([None, 1, 4]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    used = rng.permutation(experts)[: draw(st.integers(1, experts))]
    ids = rng.choice(used, shape)
    outside = rng.choice([-1, experts, 2**31 - 1, -(2**31)], shape)
    return np.where(rng.random(shape) < draw(st.sampled_from([0, 0.3, 1])), outside, ids), experts, capacity


@given(routings())
def test_any_routing(drawn: tuple[np.ndarray, int, int | None]) -> None:
    ids, experts, capacity = drawn
    same(plan(jnp.asarray(ids, jnp.int32), experts, capacity), ids, experts, capacity)


@pytest.mark.parametrize("capacity", [None, 0, 3])
@pytest.mark.parametrize("shape", [(0, 2), (3, 0), (4, 2)], ids=str)
@pytest.mark.parametrize("experts", [0, 3])
def test_nothing_to_plan(shape, experts, capacity):
    ids = np.arange(np.prod(shape)).reshape(shape) % 4
    same(plan(jnp.asarray(ids, jnp.int32), experts, capacity), ids, experts, capacity)


def bound(capacity: int | None, ids: jax.Array, out_sharding: Any = None) -> tuple[jax.Array, ...]:
    limit = {} if capacity is None else {"capacity": capacity}
    return tuple(PLAN(ids, experts=EXPERTS, out_sharding=out_sharding, **limit))


CUT = (P(), P("y"), P("x"))
CASES = [
    OpCase(
        f"plan-{capacity}",
        functools.partial(bound, capacity),
        lambda seed: [random_ids(seed, T, K, EXPERTS, dropped=0.2)],
        nests=(((0,),), ((1,), (0,))),
        shards=(
            Shard((P(),), (P(), P(), P())),
            Shard((P(),), CUT),
            Shard((P(),), (P("x"), P(), P("y"))),
            Shard((P("x"),), CUT, ("all-gather",)),
        ),
    )
    for capacity in (None, 3)
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check):
    check()


def lowered(function: Any, *types: Any) -> str:
    return jax.jit(function).trace(*types).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.any_version
def test_one_launch_and_no_sort():
    pytest.importorskip("cuda.core")
    pytest.importorskip("jax_deepgemm._ffi")
    for tokens, experts, capacity in ((1, 256, None), (4096, 32, None), (4096, 32, 5), (1 << 20, 2048, None)):
        ids = jax.ShapeDtypeStruct((tokens, 8), jnp.int32)
        text = lowered(functools.partial(plan_copies, num_experts=experts, capacity=capacity), ids)
        assert text.count("@jax_deepgemm_launch(") == 1
        assert "stablehlo.sort" not in text


@pytest.mark.any_version
def test_what_the_kernel_does_not_take_is_sorted(monkeypatch):
    pytest.importorskip("jax_deepgemm._ffi")
    ids = random_ids(0, 40, 3, 50)
    want = plan(ids, 50, None)
    monkeypatch.setattr(api, "MOST_EXPERTS", 49)
    fresh = lambda ids: plan_copies(ids, 50)  # noqa: E731
    op_checks.assert_same(jax.jit(fresh)(ids), want, 0)
    assert "stablehlo.sort" in lowered(lambda ids: plan_copies(ids, 50), ids)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("capacity", [None, 4])
def test_export_with_a_symbolic_number_of_tokens(platform, capacity):
    (tokens,) = export.symbolic_shape("t")
    ids = jax.ShapeDtypeStruct((tokens, 2), jnp.int32)
    function = jax.jit(functools.partial(plan_copies, num_experts=5, capacity=capacity))
    exported = export.export(function, platforms=[platform], disabled_checks=export_checks)(ids)
    assert "jax_deepgemm_launch" not in exported.mlir_module()
    if platform == "cpu":
        given = np.array([[4, -1], [0, 4], [4, 9]])
        same(exported.call(jnp.asarray(given, jnp.int32)), given, 5, capacity)
