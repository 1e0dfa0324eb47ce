"""Scores and choice in one op: what topk finds in mqa_logits, under every transformation; errors."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

from jax_deepgemm import export_checks, quantize, topk
from jax_deepgemm.core.chip import H200
from jax_deepgemm.core.family import Given
from jax_deepgemm.indexer import IndexerConfig, indexer_topk, mqa_logits
from jax_deepgemm.jit import compile_kernel
from jax_deepgemm.ops.indexer.prepare import prepare
from jax_deepgemm.ops.indexer_topk import sm90
from jax_deepgemm.ops.indexer_topk.family import FAMILY, IndexerTopkProblem
from jax_deepgemm.ops.topk.problem import MOST_COLUMNS
from tests.shared import op_checks
from tests.shared.arrays import normal
from tests.shared.indexer_topk_oracle import E4M3, HARD, operands, windows
from tests.shared.op_checks import OpCase, Shard

S, N, H, D, K = 8, 64, 4, 32, 5


def call(function: Any, q: Any, keys: Any, scales: Any, *rest: Any, **options: Any) -> Any:
    return function(q, (keys, scales), *rest, **options)


def wanted(*given: Any, k: int, order: str = "value") -> Any:
    """Of all scores in memory."""
    return topk(call(mqa_logits, *given), k, order=order, values=True)


# Values -----------------------------------------------------------------------------------------------------


@pytest.mark.any_version
@pytest.mark.parametrize(("n", "k", "parts"), [(1, 1, 1), (40, 64, 1), (300, 7, 21), (300, 300, 6)])
def test_as_the_two_ops(n, k, parts):
    """Rows of every kind, in both orders, of few tokens at a time and of all at once."""
    for order in ("value", "index"):
        want = jax.jit(functools.partial(wanted, k=k, order=order))
        options = {"k": k, "order": order, "scratch_bytes": 4 * n * -(-21 // parts)}
        run = jax.jit(functools.partial(call, indexer_topk, values=True, **options))
        for kind in HARD:
            given = [*operands(kind, 21, n), *windows(21, n)]
            for one, other in zip(run(*given), want(*given), strict=True):
                np.testing.assert_array_equal(one, other, err_msg=f"{kind} {order}")
        np.testing.assert_array_equal(call(indexer_topk, *given, **options), want(*given)[1])


@pytest.mark.any_version
def test_nan_is_never_chosen():
    """NaN in a token's q, in a key's scale, in keys outside of windows."""
    q, k, scales, weights = operands("mixed", S, N)
    start, end = jnp.full(S, 3), jnp.full(S, N - 2)
    clean = call(indexer_topk, q, k, scales, weights, start, end, 9)
    outside = k.at[:3].set(jnp.nan).at[N - 2 :].set(jnp.nan)
    np.testing.assert_array_equal(call(indexer_topk, q, outside, scales, weights, start, end, 9), clean)
    lost = call(indexer_topk, q.at[2, 1, 5].set(jnp.nan), k, scales, weights, start, end, 9)
    assert (np.asarray(lost)[2] == -1).all()
    np.testing.assert_array_equal(np.delete(lost, 2, 0), np.delete(clean, 2, 0))
    bad = scales.at[jnp.array([5, 30])].set(jnp.nan)
    got = call(indexer_topk, q, k, bad, weights, start, end, N)
    assert not np.isin(got, [5, 30]).any()
    assert (np.sum(np.asarray(got) >= 0, axis=1) == N - 7).all()


@pytest.mark.any_version
def test_operands_in_each_form():
    q, kv, weights = normal(0, S, H, D), normal(1, N, D), normal(2, S, H, dtype=jnp.float32)
    window = windows(S, N)
    queries, keys = quantize(q), quantize(kv)
    want = indexer_topk(queries, keys, weights, *window, K)
    np.testing.assert_array_equal(indexer_topk(q, kv, weights, *window, K), want)
    folded = weights * queries.scales[..., 0]
    given = queries.values, (keys.values, keys.scales[:, 0]), folded
    np.testing.assert_array_equal(indexer_topk(*given, *window, K), want)


@pytest.mark.any_version
def test_more_keys_than_a_kernel_takes():
    n = MOST_COLUMNS + 700
    q, k, scales, weights = operands("mixed", 3, n, h=1)
    start, end = jnp.array([0, MOST_COLUMNS - 2, n - 3]), jnp.array([2**31 - 1, n, n])
    given = [q, k, scales, weights, start, end]
    for order in ("value", "index"):
        want = jax.jit(functools.partial(wanted, k=200, order=order))(*given)
        run = functools.partial(call, indexer_topk, k=200, order=order, values=True)
        for one, other in zip(jax.jit(run)(*given), want, strict=True):
            np.testing.assert_array_equal(one, other)


# The op, under every transformation -------------------------------------------------------------------------


def both(*arrays: jax.Array, order: str = "value", out_sharding: Any = None) -> Any:
    one = out_sharding[0] if type(out_sharding) is tuple else out_sharding
    scores, keys = call(indexer_topk, *arrays, K, order=order, values=True, out_sharding=one)
    return jnp.where(keys < 0, 0, scores), keys


def draw(seed: int) -> list[jax.Array]:
    return [*operands("mixed", S, N, seed=seed), *windows(S, N, seed)]


ROWS = P("x"), P(), P(), P("x"), P("x"), P("x")
KEYS = P(), P("y"), P("y"), P(), P(), P()
BOTH = P("x"), P("y"), P("y"), P("x"), P("x"), P("x")
ALL_KEYS = P(), P(("x", "y")), P(("x", "y")), P(), P(), P()
HEADS = P(None, "y"), P(), P(), P(None, "y"), P(), P()
GATHERED = ("all-gather",) * 2
CASES = [
    OpCase(
        order,
        functools.partial(both, order=order),
        draw,
        nests=(
            ((0, 0, 0, 0, 0, 0),),
            ((0, None, None, 0, None, None),),
            ((None, 0, 0, None, 0, None), (0, None, None, 0, None, None)),
        ),
        shards=(
            Shard(ROWS, (P("x"), P("x")), modes=("auto", "explicit", "shard_map")),
            Shard(KEYS, (P(), P()), GATHERED),
            Shard(BOTH, (P("x"), P("x")), GATHERED),
            Shard(ALL_KEYS, (P(), P()), GATHERED),
            Shard(HEADS, (P(), P()), GATHERED),
        ),
    )
    for order in ("value", "index")
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check):
    check()


def test_vmap_where_keys_are_cut():
    """Levels that candidates have, and keys have not."""
    mesh = op_checks.make_mesh("auto")
    stacked = [jnp.stack([draw(seed)[i] for seed in range(2)]) for i in range(6)]
    for carried in ((0, None, None, 0, 0, 0), (None, 0, 0, None, None, None)):
        given = [x if axis == 0 else x[0] for x, axis in zip(stacked, carried, strict=True)]
        cuts = [P(*(None,) * (carried[i] == 0), *spec) for i, spec in enumerate(KEYS)]
        placed = [jax.device_put(x, jax.NamedSharding(mesh, p)) for x, p in zip(given, cuts, strict=True)]
        run = jax.jit(jax.vmap(both, carried))
        for one, other in zip(run(*placed), run(*given), strict=True):
            np.testing.assert_array_equal(one, other)


def test_derivatives():
    """The choice is none's function; scores say where gradients are to be had."""
    given = draw(0)

    def loss(weights: jax.Array, values: bool) -> jax.Array:
        found = call(indexer_topk, *given[:3], weights, *given[4:], K, values=values)
        return jnp.sum(weights) + jnp.sum(found[0] if values else jnp.where(found < 0, 0, 1))

    np.testing.assert_array_equal(jax.grad(loss)(given[3], False), jnp.ones((S, H)))
    with pytest.raises(NotImplementedError, match=r"no derivative.*scores of what is chosen in jnp"):
        jax.grad(loss)(given[3], True)


# Programs ---------------------------------------------------------------------------------------------------


def test_export():
    given = draw(0)
    run = functools.partial(call, indexer_topk, k=K)
    exported = export.export(jax.jit(run), platforms=["cpu", "cuda"], disabled_checks=export_checks)
    program = export.deserialize(exported(*given).serialize())
    assert program.mlir_module().count("@jax_deepgemm_launch(") == 1
    np.testing.assert_array_equal(program.call(*given), jax.jit(run)(*given))


def test_symbolic_sizes_on_cpu():
    s, n = export.symbolic_shape("s, n", constraints=["n >= 64"])
    given = draw(0)
    shapes = [(s, H, D), (n, D), (n,), (s, H), (s,), (s,)]
    types = [jax.ShapeDtypeStruct(shape, x.dtype) for shape, x in zip(shapes, given, strict=True)]
    run = functools.partial(call, indexer_topk, k=K)
    program = export.export(jax.jit(run), platforms=["cpu"], disabled_checks=export_checks)(*types)
    np.testing.assert_array_equal(program.call(*given), run(*given))


PROBLEM = IndexerTopkProblem(8192, 65536, 64, 128, 2048)


@pytest.mark.any_version
def test_parts_cover_all_tokens_and_fit():
    for tokens, keys, scratch in (
        (8192, 65536, 1 << 28),
        (1000, 4097, 1 << 20),
        (3, 9, 1),
        (65536, 1 << 20, 1),
    ):
        p = IndexerTopkProblem(tokens, keys, 64, 128, 8, scratch=scratch)
        parts = list(sm90.ranges(p))
        assert [first for first, _ in parts] == [sum(c for _, c in parts[:i]) for i in range(len(parts))]
        assert sum(count for _, count in parts) == tokens
        assert len(parts) <= sm90.MOST_PARTS
        most = max(count for _, count in parts)
        assert 4 * keys * most <= scratch or most <= max(16, -(-tokens // sm90.MOST_PARTS) + 15)
    assert [count for _, count in sm90.ranges(PROBLEM)] == [1024] * 8


@pytest.mark.any_version
def test_what_is_launched():
    """Scores and choice of each part, the last of which is shorter, by kernels that precompile knows."""
    pytest.importorskip("cuda.core")
    p = IndexerTopkProblem(37, 5000, 20, 64, 8, by_index=True, scratch=1 << 18)
    given = [*operands("mixed", 37, 5000, 20, 64), *windows(37, 5000)]
    names = ("q", "k", "scales", "weights", "start", "end")
    parts = {name: Given(i, x.shape) for i, (name, x) in enumerate(zip(names, prepare(True, *given)))}
    plan = FAMILY.plan(p, H200, parts)
    assert len(plan.steps) == 2 * 3
    assert plan.scratch_bytes == (4 * 5000 * 16,)
    known = {compile_kernel(source).digest for source in FAMILY.sources(p, H200)}
    assert {step.kernel.digest for step in plan.steps} == known
    assert not any(step.kernel.report.problems() for step in plan.steps)


@pytest.mark.any_version
def test_scores_run_with_what_mqa_logits_runs_with():
    from jax_deepgemm.ops.indexer.family import FAMILY as LOGITS

    assert FAMILY.choose(PROBLEM, H200).config == LOGITS.choose(PROBLEM.logits, H200).config
    given = IndexerConfig(1, 4)
    assert FAMILY.choose(PROBLEM, H200, given).config == given


# Errors -----------------------------------------------------------------------------------------------------

Q, KEY, SCALES, W = operands("mixed", S, N)
FULL = np.zeros(S, np.int32), np.full(S, N, np.int32)


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("error", "message", "run"),
    [
        (ValueError, "k is 0, need .* from 1 to 2048", lambda: indexer_topk(Q, (KEY, SCALES), W, *FULL, 0)),
        (ValueError, "k is 2049.*topk.mqa_logits", lambda: indexer_topk(Q, (KEY, SCALES), W, *FULL, 2049)),
        (ValueError, "k is True", lambda: indexer_topk(Q, (KEY, SCALES), W, *FULL, True)),
        (ValueError, "order is 'key'", lambda: indexer_topk(Q, (KEY, SCALES), W, *FULL, 3, order="key")),
        (
            ValueError,
            "scratch_bytes is 0, need a positive int",
            lambda: indexer_topk(Q, (KEY, SCALES), W, *FULL, 3, scratch_bytes=0),
        ),
        (
            TypeError,
            "^indexer_topk: q is float32",
            lambda: indexer_topk(Q.astype("float32"), KEY, W, *FULL, 3),
        ),
        (TypeError, "indexer_topk: kv is float8.*need a Quant", lambda: indexer_topk(Q, KEY, W, *FULL, 3)),
        (ValueError, "weights are .8, 3.", lambda: indexer_topk(Q, (KEY, SCALES), W[:, :3], *FULL, 3)),
        (
            ValueError,
            "window of token 0 is .0, 65., need",
            lambda: indexer_topk(Q, (KEY, SCALES), W, FULL[0], FULL[1] + 1, 3),
        ),
        (
            TypeError,
            "config is 3, need an IndexerConfig",
            lambda: indexer_topk(Q, (KEY, SCALES), W, *FULL, 3, config=3),
        ),
    ],
)
def test_errors(error, message, run):
    with pytest.raises(error, match=message):
        run()


@pytest.mark.any_version
def test_nothing_is_no_error():
    empty = [Q[:0], (KEY, SCALES), W[:0], FULL[0][:0], FULL[1][:0]]
    assert indexer_topk(*empty, 3).shape == (0, 3)
    none = indexer_topk(Q, (KEY[:0], SCALES[:0]), W, FULL[0], FULL[0], 3)
    assert (np.asarray(none) == -1).all()
    assert KEY.dtype == E4M3
