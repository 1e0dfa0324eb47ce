"""accumulate_gradients: sums are right whatever goes through layers, and are written in their place."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm import accumulate_gradients, fp8_linear, grouped_linear, prepare_weight
from jax_deepgemm.moe import ExpertForm, expert_mlp, moe_mlp, route
from tests.gemm import test_aot
from tests.shared.arrays import normal

BF16, F32 = jnp.bfloat16, jnp.float32
STEPS, M, N, K, G = 3, 40, 256, 384, 2
SIZES = jnp.array([15, 20], jnp.int32)
BATCHES = normal(0, STEPS, M, K)
IDS, WEIGHTS = route(normal(6, M, G, dtype=F32), 1)
Weights = dict[str, Any]


def linear(weights: Weights, x: Any) -> Any:
    y, first = fp8_linear(x, weights["first"], with_weight=True)
    y, second = fp8_linear(y, weights["second"], with_weight=True)
    y = y.astype(F32) + weights["bias"].astype(F32)
    return jnp.mean(jnp.square(y)), weights | {"first": first, "second": second}


def grouped(weights: Weights, x: Any, recipe: str = "fp8") -> Any:
    y, first = grouped_linear(x, weights["first"], SIZES, with_weight=True, recipe=recipe)
    y, second = grouped_linear(y[:, : N // 2], weights["second"], SIZES, with_weight=True, recipe=recipe)
    y = y.astype(F32) + weights["bias"].astype(F32)
    return jnp.mean(jnp.square(y)), weights | {"first": first, "second": second}


def experts(weights: Weights, x: Any) -> Any:
    pair = weights["first"], weights["second"]
    y, (first, second) = expert_mlp(x, *pair, SIZES, with_weights=True)
    y = y.astype(F32) + weights["bias"].astype(F32)
    return jnp.mean(jnp.square(y)), weights | {"first": first, "second": second}


def mixture(weights: Weights, x: Any, **options: Any) -> Any:
    pair = weights["first"], weights["second"]
    y, (first, second) = moe_mlp(x, IDS, WEIGHTS, *pair, with_weights=True, **options)
    y = y.astype(F32) + weights["bias"].astype(F32)
    return jnp.mean(jnp.square(y)), weights | {"first": first, "second": second}


def masters(*lead: int, dtype: Any = BF16) -> Weights:
    """With groups, the first weight is also gate and up of experts."""
    first, second = (
        normal(1, *lead, N, K, dtype=dtype) / 16,
        normal(2, *lead, K, N // max(1, 2 * bool(lead)), dtype=dtype) / 16,
    )
    return {"first": first, "second": second, "bias": normal(3, K, dtype=dtype)}


LOSSES: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "fp8_linear": (linear, ()),
    "grouped_linear": (grouped, (G,)),
    "expert_mlp": (experts, (G,)),
    "moe_mlp": (mixture, (G,)),
    "moe_mlp weights first": (functools.partial(mixture, form=ExpertForm(weights_first=True)), (G,)),
}


def prepared(weights: Weights) -> Weights:
    return weights | {name: prepare_weight(weights[name]) for name in ("first", "second")}


def over_microbatches(loss: Any, weights: Weights, sums: Any, batches: Any) -> Any:
    def body(sums: Any, x: Any) -> Any:
        value, sums = accumulate_gradients(loss, weights, sums, x)
        return sums, value

    return jax.lax.scan(body, sums, batches)


def one_by_one(loss: Any, weights: Weights, sums: Any, batches: Any) -> Any:
    """over_microbatches without a program around it: XLA compiles each op once for all losses."""
    values = []
    for x in batches:
        value, sums = accumulate_gradients(loss, weights, sums, x)
        values.append(value)
    return sums, jnp.stack(values)


def expected(loss: Any, weights: Weights, sums: Any, batches: Any) -> Any:
    """By jax.grad, in float32, added in float64; and the loss of each batch."""
    wide = jax.tree.map(lambda w: w.astype(F32), weights)
    total = jax.tree.map(lambda one: np.asarray(one, np.float64), sums)
    values = []
    for x in batches:
        value, gradient = jax.value_and_grad(lambda w, x=x: loss(w, x)[0])(wide)
        total = jax.tree.map(lambda one, other: one + np.asarray(other, np.float64), total, gradient)
        values.append(value)
    return total, np.stack(values)


def nonzero_sums(weights: Weights) -> Any:
    return jax.tree.map(lambda w: normal(7, *w.shape, dtype=F32) / 64, weights)


@functools.cache
def expected_of(name: str) -> Any:
    loss, lead = LOSSES[name]
    weights = masters(*lead)
    return expected(loss, weights, nonzero_sums(weights), BATCHES)


def near(got: Any, want: Any, bound: float = 1e-2) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = (np.asarray(z, np.float64) for z in (one, other))
        assert np.linalg.norm(one - other) < bound * np.linalg.norm(other)


@pytest.mark.any_version
@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("how", ["prepared", "masters", "checkpoint"])
def test_sums_of_gradients(name: str, how: str) -> None:
    """bfloat16 weights, sums in float32, from sums that are not zero."""
    loss, lead = LOSSES[name]
    weights = masters(*lead)
    sums = nonzero_sums(weights)
    used = weights if how == "masters" else prepared(weights)
    loss = jax.checkpoint(loss) if how == "checkpoint" else loss
    if how == "prepared":
        got = jax.jit(functools.partial(over_microbatches, loss))(used, sums, BATCHES)
    else:
        got = one_by_one(loss, used, sums, BATCHES)
        looped = jax.eval_shape(functools.partial(over_microbatches, loss), used, sums, BATCHES)
        assert jax.tree.map(jnp.shape, looped) == jax.tree.map(jnp.shape, got)
    assert {leaf.dtype for leaf in jax.tree.leaves(got[0])} == {jnp.dtype(F32)}
    near(got, expected_of(name))


def test_weights_used_twice_or_never() -> None:
    """Handed on or not: the sum so far counts once."""
    weights = {"w": normal(1, K, K, dtype=F32) / 16, "idle": normal(2, 8, K, dtype=F32)}
    used = {name: prepare_weight(w) for name, w in weights.items()}
    sums = jax.tree.map(lambda w: jnp.full(w.shape, 0.5, F32), weights)
    x = BATCHES[0]

    def handed_on(weights: Weights, x: Any) -> Any:
        y, w = fp8_linear(x, weights["w"], with_weight=True)
        y, w = fp8_linear(y, w, with_weight=True)
        return jnp.sum(jnp.sin(y.astype(F32))), weights | {"w": w}

    def last_only(weights: Weights, x: Any) -> Any:
        y, w = fp8_linear(fp8_linear(x, weights["w"]), weights["w"], with_weight=True)
        return jnp.sum(jnp.sin(y.astype(F32))), weights | {"w": w}

    want = jax.grad(lambda w: handed_on(w, x)[0])(weights)["w"]
    for loss in (handed_on, last_only):
        _, totals = accumulate_gradients(loss, used, sums, x)
        near(totals, {"w": want + 0.5, "idle": sums["idle"]}, 1e-5)


def test_in_a_carry_of_the_differentiated_scan() -> None:
    """jax.grad of a scan that hands the weight from one microbatch to the next."""
    w = normal(1, N, K, dtype=F32) / 16

    def loss(w: Any, batches: Any) -> Any:
        copies = prepare_weight(w)

        def body(carry: Any, x: Any) -> Any:
            total, master = carry
            y, used = fp8_linear(x, copies.with_master(master), with_weight=True)
            return (total + jnp.sum(jnp.sin(y.astype(F32))), used.master), None

        return jax.lax.scan(body, (jnp.zeros((), F32), w), batches)[0][0]

    def plain(w: Any, batches: Any) -> Any:
        return sum(jnp.sum(jnp.sin(fp8_linear(x, w).astype(F32))) for x in batches)

    text = str(jax.make_jaxpr(jax.grad(loss))(w, BATCHES))
    assert text.count("= fp8_gemm_row_add[") == 1
    assert not re.search(rf"u8\[{STEPS},({N},{K}|{K},{N})\]", text)
    near(jax.jit(jax.grad(loss))(w, BATCHES), jax.grad(plain)(w, BATCHES))


def test_other_results_of_a_loss() -> None:
    weights = masters(dtype=F32)
    sums = jax.tree.map(jnp.zeros_like, weights)
    loss = lambda w, x: (*linear(w, x), x.shape)  # noqa: E731
    value, totals, aux = accumulate_gradients(loss, prepared(weights), sums, BATCHES[0], has_aux=True)
    assert aux == BATCHES[0].shape
    assert value.shape == ()
    near(totals, expected(linear, weights, sums, BATCHES[:1])[0])


@pytest.mark.any_version
@pytest.mark.parametrize("loss", [grouped, mixture])
def test_bf16_recipe_hands_on_too(loss: Any) -> None:
    weights = masters(G)
    sums = jax.tree.map(lambda w: jnp.ones(w.shape, F32), weights)
    loss = functools.partial(loss, recipe="bf16")
    _, totals = accumulate_gradients(loss, weights, sums, BATCHES[0])
    near(totals, expected(loss, weights, sums, BATCHES[:1])[0])


def _moe(w: Weights, weights_of: Any = lambda w: w) -> Any:
    w2 = w["second"][None, :, : N // 2]
    return moe_mlp(BATCHES[0], IDS * 0, WEIGHTS, w["first"][None], weights_of(w2), with_weights=True)


def _explicit(w: Weights) -> Any:
    mesh = jax.make_mesh(
        (2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2]
    )
    with jax.set_mesh(mesh):
        return _moe(w)


@pytest.mark.any_version
@pytest.mark.parametrize("layer", [fp8_linear, grouped_linear, expert_mlp, moe_mlp])
def test_overloads_say_what_the_function_takes(layer: Any) -> None:
    for overload in typing.get_overloads(layer):
        assert list(inspect.signature(overload).parameters) == list(inspect.signature(layer).parameters)
    assert len(typing.get_overloads(layer)) == 2


ERRORS: list[tuple[Callable[[Weights, Weights], Any], str]] = [
    (lambda w, s: accumulate_gradients(linear, w, {"first": s["first"]}, BATCHES[0]), "need the same pytree"),
    (
        lambda w, s: accumulate_gradients(lambda w, x: (linear(w, x)[0], ()), w, s, BATCHES[0]),
        "the weights that the loss returns are .* as it came out of its layer",
    ),
    (
        lambda w, s: accumulate_gradients(lambda w, x: (x, w), w, s, BATCHES[0]),
        r"the loss is \[40, 384\], need a scalar",
    ),
    (lambda w, s: accumulate_gradients(linear, w, s | {"bias": s["first"]}, BATCHES[0]), "jnp.zeros_like"),
    (
        lambda w, s: fp8_linear(BATCHES[0], jdg.quantize(w["first"], (128, 128)), with_weight=True),
        "fp8_linear: w is quantised, .* has no gradient",
    ),
    (
        lambda w, s: grouped_linear(
            BATCHES[0], jdg.quantize(w["first"][None], (128, 128)), SIZES[:1], with_weight=True
        ),
        "grouped_linear: w is quantised",
    ),
    (lambda w, s: _moe(w, lambda w2: jdg.quantize(w2, (128, 128))), "moe_mlp: w2 is quantised"),
    (lambda w, s: _explicit(w), "moe_mlp: with_weights on the Explicit axes .* inside jax.shard_map"),
]


@pytest.mark.any_version
@pytest.mark.parametrize("case", ERRORS, ids=[case[1] for case in ERRORS])
def test_errors(case: Any) -> None:
    call, message = case
    weights = masters(dtype=F32)
    with pytest.raises(ValueError, match=message):
        call(weights, weights)


# Compiled for an H200 ---------------------------------------------------------------------------------------


@pytest.mark.skipif(*test_aot.pytestmark.args, **test_aot.pytestmark.kwargs)
@pytest.mark.parametrize("name", list(LOSSES))
def test_the_product_adds_in_place(name: str) -> None:
    """In the loop over microbatches each weight has one product that adds, into the buffer of its sum: no
    addition, no copy and no other float32 array of its size."""
    pytest.importorskip("cuda.core")
    one = jax.sharding.SingleDeviceSharding(test_aot.devices()[0])
    on = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)  # noqa: E731
    loss, lead = LOSSES[name]

    def run(weights: Weights, sums: Any, batches: Any) -> Any:
        return over_microbatches(loss, prepared(weights), sums, batches)

    weights = masters(*lead)
    sums = jax.tree.map(lambda w: w.astype(F32), weights)
    types = jax.tree.map(on, (weights, sums, BATCHES))
    hlo = jax.jit(run, donate_argnums=1).lower(*types).compile().as_text()
    calls = [line for line in hlo.splitlines() if re.search(r"_add_kernel\S* = .*jax_deepgemm_launch", line)]
    assert len(calls) == 2
    assert all("output_to_operand_aliasing={{" in line for line in calls)
    assert len(re.findall(r"may-alias", hlo)) == 3
    for shape in {
        ",".join(map(str, dims)) for dims in (x.shape for x in (weights["first"], weights["second"]))
    }:
        made = re.findall(rf"= f32\[{shape}\]\S* (\w[\w-]*)\(", hlo)
        assert set(made) <= {"parameter", "get-tuple-element", "custom-call", "bitcast"}, made
    assert len(re.findall(r"%quantize_weight\S*_kernel\S* = .*jax_deepgemm_launch", hlo)) == 2
