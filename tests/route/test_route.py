"""Routing as an op: jit, vmap, shardings, derivatives; against a loop, whatever the logits are; limits."""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import PartitionSpec as P

from jax_deepgemm.moe import DEEPSEEK_V3, route
from jax_deepgemm.ops.route import reference
from jax_deepgemm.ops.route.family import RouteProblem
from jax_deepgemm.ops.route.router import Router
from jax_deepgemm.ops.route.sm90 import KERNELS, kernel_name, kernel_source
from tests.shared import op_checks, route_cases
from tests.shared.arrays import normal
from tests.shared.op_checks import OpCase, Shard

F32 = jnp.float32
TOKENS, EXPERTS, TOP_K = 16, 16, 4
GROUPS: dict[str, Any] = {"score": "sigmoid", "num_groups": 4, "top_groups": 2}


def weights_of(**options: Any) -> Any:
    return lambda logits, out_sharding=None: route(logits, TOP_K, **options)[1]


def plain_of(router: Router) -> Any:
    return lambda logits, out_sharding=None: reference.choose(logits, None, router)[1]


def both(logits: jax.Array, bias: jax.Array, out_sharding: Any = None) -> tuple[jax.Array, jax.Array]:
    return route(logits, TOP_K, bias=bias, **GROUPS)


def logits(seed: int) -> list[jax.Array]:
    return [normal(seed, TOKENS, EXPERTS, dtype=F32)]


CASES = [
    OpCase(
        f"route-{router.score}",
        fn=weights_of(score=router.score, renormalize=router.renormalize),
        args=logits,
        nests=(((0,),), ((0,), (0,))),
        shards=(
            Shard((P("x", None),), P("x", None)),
            Shard((P(("x", "y"), None),), P(("x", "y"), None), modes=("auto", "explicit", "shard_map")),
            Shard((P("y", "x"),), P("y", None), ("all-gather",)),
        ),
        plain=plain_of(router),
        wrt=(0,),
        second=True,
    )
    for router in (Router(TOP_K), Router(TOP_K, "sqrt_softplus", renormalize=False))
] + [
    OpCase(
        "route-both",
        fn=both,
        args=lambda seed: [*logits(seed), normal(seed + 9, EXPERTS, dtype=F32)],
        nests=(((0, None),), ((0, 0),)),
        shards=(Shard((P("y", None), P()), (P("y", None), P("y", None))),),
    )
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check):
    check()


def test_chosen_experts_stay_whole_where_a_result_is_asked_in_pieces():
    """XLA may want the weights cut along top_k: each device chooses among all and is cut afterwards."""
    mesh = op_checks.make_mesh("auto", (2, 4), ("x", "y"))
    cut = jax.sharding.NamedSharding(mesh, P("x", "y"))
    [x] = logits(0)
    got = jax.jit(weights_of(), out_shardings=cut)(
        jax.device_put(x, jax.sharding.NamedSharding(mesh, P("x")))
    )
    np.testing.assert_array_equal(got, weights_of()(x))


# Any logits -------------------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-30, np.inf, -np.inf, np.nan, float(np.finfo(np.float32).min), 3e38]


@st.composite
def routers(draw: Any) -> tuple[int, Router]:
    groups, size = draw(st.sampled_from([1, 4])), draw(st.sampled_from([1, 2, 5]))
    top_groups = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(top_groups * size, 6)))
    score = draw(st.sampled_from(["softmax", "sigmoid", "sqrt_softplus", None]))
    return groups * size, Router(top_k, score, groups, top_groups, draw(st.booleans()), 1.5)


@pytest.mark.any_version
@settings(max_examples=30, deadline=None)
@given(routers(), st.integers(0, 2**32 - 1), st.booleans())
def test_any_scores_are_ranked_as_by_a_loop(form, seed, biased):
    """Ready scores, which no rounding moves; others by the scores that the reference gives every expert."""
    experts, router = form
    rng = np.random.default_rng(seed)
    rows = np.where(
        rng.random((3, experts)) < 0.5, rng.choice(SPECIAL, (3, experts)), rng.normal(size=(3, experts))
    )
    x, bias = rows.astype(np.float32), np.round(rng.normal(size=experts)).astype(np.float32)
    everything = reference.choose(jnp.asarray(x), None, Router(experts, router.score, renormalize=False))
    ids, weights = map(np.asarray, reference.choose(jnp.asarray(x), bias if biased else None, router))
    for token in range(len(x)):
        scores = np.empty(experts, np.float32)
        scores[np.asarray(everything[0][token])] = everything[1][token]
        with np.errstate(all="ignore"):
            ranking = scores + (bias if biased else 0)
            assert ids[token].tolist() == route_cases.choice(ranking.astype(np.float64), router)
            chosen = scores[ids[token]]
            want = chosen / (chosen.sum() + np.float32(1e-20)) if router.renormalize else chosen
        if not np.any(np.abs(chosen) > 1e30):  # a CPU divides by the inverse, which is then none
            np.testing.assert_allclose(weights[token], 1.5 * want, rtol=1e-6)


def test_sqrt_softplus_and_its_gradient_at_every_size():
    x = np.concatenate([np.linspace(-170, 80, 101), [-17.0, np.nextafter(np.float32(-17), 0), 0.0]])
    scores = lambda x: route(x[:, None], 1, score="sqrt_softplus")[1][:, 0]  # noqa: E731
    got, slope = jax.jit(lambda x: (scores(x), jax.grad(lambda x: scores(x).sum())(x)))(jnp.asarray(x, F32))
    wide = np.asarray(x, np.float32).astype(np.float64)
    want = np.sqrt(np.logaddexp(0, wide))
    np.testing.assert_allclose(got, want, rtol=1e-5)  # a logarithm by the CPU is a few units off
    np.testing.assert_allclose(slope, np.exp(-np.logaddexp(0, -wide)) / (2 * want), rtol=1e-5)
    far = jax.grad(lambda x: route(x, 2, score="sqrt_softplus")[1][0, 0])(jnp.array([[-1e9, -400.0, -300.0]]))
    assert np.isfinite(far).all()


# What cuda runs ---------------------------------------------------------------------------------------------


def lowered(function: Any, *operands: Any) -> str:
    return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def both_passes(logits: jax.Array, by: jax.Array, **options: Any) -> jax.Array:
    return jax.vjp(lambda x: route(x, by.shape[1], **options)[1], logits)[1](by)[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_one_kernel_forward_and_one_backward(dtype):
    pytest.importorskip("jax_deepgemm._ffi")
    x, by = jax.ShapeDtypeStruct((64, 256), dtype), jax.ShapeDtypeStruct((64, 8), F32)
    bias = jnp.zeros(256)
    text = lowered(functools.partial(both_passes, bias=bias, **DEEPSEEK_V3), x, by)
    assert text.count("jax_deepgemm_launch") == 2
    assert all(word not in text for word in ("sort", "scatter", "top_k", "while"))


@pytest.mark.parametrize(
    ("experts", "top_k", "options"),
    [(2049, 2, {}), (64, 33, {}), (128, 4, {"num_groups": 64, "top_groups": 2})],
    ids=str,
)
def test_beyond_the_kernels_xla_sorts_and_says_so(experts, top_k, options, caplog):
    pytest.importorskip("jax_deepgemm._ffi")
    x, by = jax.ShapeDtypeStruct((4, experts), F32), jax.ShapeDtypeStruct((4, top_k), F32)
    with caplog.at_level(logging.INFO):
        assert "jax_deepgemm_launch" not in lowered(functools.partial(both_passes, **options), x, by)
    assert "the kernels take" in caplog.text


def test_symbolic_tokens_run_without_a_kernel():
    (b,) = export.symbolic_shape("b")
    router = jax.jit(lambda x: route(x, TOP_K))
    exported = export.export(router, platforms=["cuda", "cpu"])(jax.ShapeDtypeStruct((b, EXPERTS), F32))
    [x] = logits(0)
    np.testing.assert_array_equal(exported.call(x)[0], router(x)[0])


@pytest.mark.any_version
def test_kernels_of_all_forms_compile_without_spills():
    pytest.importorskip("cuda.core")
    from jax_deepgemm.jit import compile_kernel

    for experts, router, biased in (
        (256, Router(8, "sigmoid", 8, 4), True),
        (2048, Router(32, "sqrt_softplus"), False),
        (2048, Router(32, None, 32, 4), True),
        (1, Router(1), False),
    ):
        for kind in ("route", "route_gradient"):
            p = RouteProblem(kind, 1, experts, router, "bfloat16", biased and kind == "route")
            [source] = KERNELS.sources(p, None)
            assert compile_kernel(source).report.problems() == (), p


@pytest.mark.any_version
def test_one_source_serves_all_numbers_of_tokens_and_scales():
    first = RouteProblem("route", 1, 64, Router(4))
    other = RouteProblem("route", 999, 64, Router(4, scale=3.0))
    assert kernel_source(first).text == kernel_source(other).text
    assert kernel_name(first) == "jdg_route_softmax_e64_k4_f32_sum1"
    assert str(RouteProblem("route", 9, 256, Router(8, "sigmoid", 8, 4, True, 2.5), biased=True)) == (
        "route 9x256 top 8 sigmoid float32 groups 4 of 8 bias renormalized scale=2.5"
    )
