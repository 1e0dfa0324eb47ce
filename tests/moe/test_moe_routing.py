"""route, dispatch and combine: against loops, their gradients, ties, dropped copies, errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_deepgemm.moe import combine, dispatch, plan_dispatch, route, spread_weights
from jax_deepgemm.ops.dispatch.reference import sort_copies
from tests.shared import moe_oracle as oracle
from tests.shared import op_checks

F32 = jnp.float32

ROUTERS: list[dict[str, Any]] = [
    {},
    {"renormalize": False, "scale": 1.5},
    {"score": "sigmoid"},
    {"score": "sigmoid", "num_groups": 4, "top_groups": 2, "scale": 2.5},
    {"num_groups": 16, "top_groups": 5, "renormalize": False},
    {"score": "sigmoid", "num_groups": 4, "top_groups": 1, "bias": True},
    {"bias": True},
]


@pytest.mark.parametrize("options", ROUTERS, ids=str)
def test_route_matches_a_loop(options):
    options = dict(options)
    logits = oracle.normal(0, 33, 16, dtype=F32)
    if options.pop("bias", False):
        options["bias"] = oracle.normal(1, 16, dtype=F32)
    ids, weights = jax.jit(lambda x: route(x, 4, **options))(logits)
    wide = {name: oracle.wide(value) if name == "bias" else value for name, value in options.items()}
    want_ids, want = oracle.route(oracle.wide(logits), 4, **wide)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want, rtol=1e-5)
    assert (ids.dtype, weights.dtype) == (jnp.int32, F32)


@pytest.mark.parametrize("renormalize", [True, False])
def test_route_gradient(renormalize):
    """Through the scores of the chosen experts; the bias has none."""
    logits, bias = oracle.normal(0, 5, 12, dtype=F32), oracle.normal(1, 12, dtype=F32)
    target = oracle.normal(2, 5, 3, dtype=F32)

    def loss(logits: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.sum(route(logits, 3, score="sigmoid", bias=bias, renormalize=renormalize)[1] * target)

    def plain(logits: jax.Array) -> jax.Array:
        ids = jnp.argsort(-(jax.nn.sigmoid(logits) + bias), axis=-1)[:, :3]
        chosen = jnp.sum(jax.nn.one_hot(ids, 12) * jax.nn.sigmoid(logits)[:, None], axis=-1)
        return jnp.sum((chosen / chosen.sum(-1, keepdims=True) if renormalize else chosen) * target)

    got, of_bias = jax.jit(jax.grad(loss, (0, 1)))(logits, bias)
    np.testing.assert_allclose(got, jax.grad(plain)(logits), atol=1e-6)
    assert not np.any(np.asarray(of_bias))


def test_ties_go_to_the_lowest_id():
    assert route(jnp.zeros((2, 8)), 3)[0].tolist() == [[0, 1, 2]] * 2
    scores = jnp.array([[-0.0, 0.0, -0.0, 1.0]])
    assert route(scores, 3, score=None)[0].tolist() == [[3, 0, 1]]
    ids, _ = route(jnp.zeros((1, 8)), 3, score="sigmoid", num_groups=4, top_groups=2)
    assert ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid", None])
def test_nan_and_infinite_logits_give_distinct_ids_in_range(score):
    logits = np.asarray(oracle.normal(0, 5, 8, dtype=F32)).copy()
    logits[0, 3] = np.nan
    logits[1] = np.nan
    logits[2, :] = -np.inf
    logits[3, 5] = np.inf
    logits[4, 1:] = np.nan
    for options in ({}, {"num_groups": 4, "top_groups": 2}):
        ids, weights = route(jnp.asarray(logits), 4, score=score, **options)
        assert all(sorted(set(row)) == sorted(row) and min(row) >= 0 and max(row) < 8 for row in ids.tolist())
        if score != "softmax":
            assert 3 not in ids[0].tolist()
        assert np.isnan(np.asarray(weights[1])).all()
        if options:
            assert len({expert // 2 for expert in ids[4].tolist()}) <= 2
        assert np.isnan(np.asarray(route(jnp.asarray(logits), 8, score=score)[1][0])).any()


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((4, 8), {"top_k": 9}, "top_k is 9 and there are 8 experts"),
        ((4, 8), {"top_k": 0}, "top_k is 0"),
        ((4, 8), {"top_k": 2, "num_groups": 3, "top_groups": 1}, "num_groups is 3 and there are 8"),
        ((4, 8), {"top_k": 2, "num_groups": 4, "top_groups": 5}, "top_groups is 5 of 4"),
        ((4, 8), {"top_k": 3, "num_groups": 4, "top_groups": 1}, "1 groups have 2 experts"),
        ((4, 8), {"top_k": 2, "num_groups": 4}, "both or neither"),
        ((4, 8), {"top_k": 2, "score": "relu"}, "score is 'relu'"),
        ((2, 4, 8), {"top_k": 2}, r"logits are \[2, 4, 8\]"),
        ((4, 8), {"top_k": 2, "bias": jnp.zeros(7)}, r"bias is \[7\]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_route_errors(shape, options, words):
    with pytest.raises(ValueError, match=words):
        route(jnp.zeros(shape), **options)


def test_route_refuses_integers():
    with pytest.raises(TypeError, match="logits are int32"):
        route(jnp.zeros((2, 4), jnp.int32), 1)


IDS = [
    oracle.random_ids(0, 40, 3, 7),
    oracle.random_ids(1, 40, 3, 7, dropped=0.3),
    jnp.full((5, 2), -1),
    jnp.array([[7, -3], [100, 6], [2**31 - 1, 0]]),
    jnp.zeros((6, 1), jnp.int32),
    jnp.zeros((0, 2), jnp.int32),
]


@pytest.mark.parametrize("ids", IDS, ids=lambda ids: f"{ids.shape}-{ids.sum()}")
def test_dispatch_matches_a_loop(ids):
    experts, x = 7, oracle.normal(3, ids.shape[0], 5)
    rows, plan = jax.jit(dispatch, static_argnums=2)(x, ids, experts)
    copies = [(e, t, s) for (t, s), e in np.ndenumerate(np.asarray(ids)) if 0 <= e < experts]
    copies.sort(key=lambda copy: copy[0])
    assert plan.group_sizes.tolist() == [sum(e == g for e, _, _ in copies) for g in range(experts)]
    want = np.zeros(rows.shape)
    for row, (_, token, slot) in enumerate(copies):
        want[row] = oracle.wide(x[token])
        assert plan.position[token, slot] == row
    np.testing.assert_array_equal(oracle.wide(rows), want)
    assert int(plan.kept.sum()) == len(copies)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32", "int64"])
def test_ids_of_any_width_count_experts_beyond_it(dtype):
    ids = np.array([[5, 100], [0, 7]], dtype)
    plan = plan_dispatch(ids, 300)
    assert int(plan.group_sizes.sum()) == 4
    assert plan.group_sizes[jnp.array([0, 5, 7, 100])].tolist() == [1, 1, 1, 1]


def test_sorting_by_two_keys_is_the_same():
    """More experts times copies than one 32-bit key holds."""
    expert = oracle.random_ids(0, 40, 3, 50).reshape(-1).astype(jnp.uint32)
    op_checks.assert_same(sort_copies(expert, 2**26), sort_copies(expert, 50), 0)


@pytest.mark.parametrize("weighted", [False, True])
def test_combine_and_gradients(weighted):
    """y -> combine(f(dispatch(x))): values and gradients of plain jnp, dropped copies included."""
    ids = oracle.random_ids(1, 40, 3, 7, dropped=0.3)
    x, weights = oracle.normal(0, 40, 5, dtype=F32), oracle.normal(1, 40, 3, dtype=F32)
    factor = oracle.normal(2, 7, 5, dtype=F32)

    def layer(x: jax.Array, weights: jax.Array) -> jax.Array:
        rows, plan = dispatch(x, ids, 7)
        expert = jnp.repeat(jnp.arange(7), plan.group_sizes, total_repeat_length=rows.shape[0])
        rows = jnp.sin(rows) * factor[expert]
        if weighted:
            return combine(rows, plan, weights)
        return combine(rows * spread_weights(weights, plan)[:, None], plan)

    def plain(x: jax.Array, weights: jax.Array) -> jax.Array:
        share = jnp.where(ids >= 0, weights, 0)
        return jnp.einsum("th,tsh,ts->th", jnp.sin(x), factor[ids], share)

    loss = lambda f: lambda *z: jnp.sum(jnp.cos(f(*z)))  # noqa: E731
    op_checks.assert_same(jax.jit(layer)(x, weights), plain(x, weights), 1e-5)
    got = jax.jit(jax.grad(loss(layer), (0, 1)))(x, weights)
    op_checks.assert_same(got, jax.grad(loss(plain), (0, 1))(x, weights), 1e-5)


def test_copies_are_summed_in_float32():
    """256 + 1 is no bfloat16; four times 1 on top of it must not get lost."""
    y = jnp.array([256.0, 1, 1, 1, 1], jnp.bfloat16)[:, None]
    _, plan = dispatch(jnp.ones((1, 1)), jnp.arange(5)[None], 5)
    assert combine(y, plan).tolist() == [[260.0]]


def test_dropped_copies_may_have_any_weight():
    ids = jnp.array([[0, -1], [-1, -1]])
    rows, plan = dispatch(jnp.ones((2, 3)), ids, 2)
    out = combine(rows, plan, jnp.array([[2.0, jnp.nan], [jnp.nan, jnp.inf]]))
    np.testing.assert_array_equal(out, [[2.0] * 3, [0.0] * 3])


def test_no_row_is_written_twice():
    """Neither direction scatters; what the plan's reference does is inside its op."""
    x, ids = oracle.normal(0, 16, 8), oracle.random_ids(0, 16, 2, 4)

    def loss(x: jax.Array) -> jax.Array:
        rows, plan = dispatch(x, ids, 4)
        return jnp.sum(combine(jnp.sin(rows), plan, jnp.ones((16, 2))).astype(F32))

    text = str(jax.make_jaxpr(jax.grad(loss))(x))
    assert "scatter" not in text
    assert text.count("plan_dispatch[") == 1


def test_vmap_and_shard_map():
    x, ids = (
        oracle.normal(0, 8, 6, 4, dtype=F32),
        jnp.stack([oracle.random_ids(i, 6, 2, 5) for i in range(8)]),
    )
    weights = oracle.normal(1, 8, 6, 2, dtype=F32)

    def layer(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        rows, plan = dispatch(x, ids, 5)
        return combine(jnp.sin(rows), plan, weights)

    want = jnp.stack([jax.jit(layer)(*z) for z in zip(x, ids, weights)])
    op_checks.assert_same(jax.jit(jax.vmap(layer))(x, ids, weights), want, 1e-6)
    mesh = op_checks.make_mesh("auto", (8,), ("x",))
    local = lambda *z: layer(*(one[0] for one in z))[None]  # noqa: E731
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
    op_checks.assert_same(mapped(x, ids, weights), want, 1e-6)
    loss = lambda f: lambda x, w: jnp.sum(jnp.cos(f(x, ids, w)))  # noqa: E731
    op_checks.assert_same(
        jax.jit(jax.grad(loss(mapped), (0, 1)))(x, weights),
        jax.jit(jax.grad(loss(jax.vmap(layer)), (0, 1)))(x, weights),
        1e-5,
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: dispatch(jnp.ones((3, 2)), jnp.zeros((4, 1), jnp.int32), 2),
            r"x is \[3, 2\], need \[4, h\]",
        ),
        (lambda: dispatch(jnp.ones((3, 2)), jnp.zeros((3, 1)), 2), "ids are float32"),
        (lambda: dispatch(jnp.ones((3, 2)), jnp.zeros(3, jnp.int32), 2), r"ids are int32 \[3\]"),
        (lambda: combine(jnp.ones((3, 2)), plan_dispatch(jnp.zeros((3, 2), jnp.int32), 2)), r"need \[6, h\]"),
        (
            lambda: combine(jnp.ones((6, 2)), plan_dispatch(jnp.zeros((3, 2), jnp.int32), 2), jnp.ones(6)),
            r"weights are \[6\], need \[3, 2\]",
        ),
    ],
)
def test_dispatch_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()
