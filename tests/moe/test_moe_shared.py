"""Shared experts: as the last ones of w13 and w2, and with weights of their own, against float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm import quantize
from jax_deepgemm.moe import (
    ExpertForm,
    SharedExperts,
    moe_layer,
    moe_mlp,
    moe_mlp_decode,
    prepare_weights,
)
from tests.shared import op_checks
from tests.shared.expert_forms import MODELS, arrays, biases, bound, float64
from tests.shared.moe_oracle import pull, relative, wide

pytestmark = pytest.mark.any_version

F32 = jnp.float32
ROUTED = 3  # of four experts; the last one is shared
both = pytest.mark.parametrize("recipe", ["fp8", "bf16"])


def over_mesh(*args: Any, **options: Any) -> jax.Array:
    return moe_layer(*args, mesh=op_checks.make_mesh("auto", (3,), ("expert",)), **options)[0]


def worst(got: Any, want: Any) -> float:
    return max(relative(one, other) for one, other in zip(got, want, strict=True))


@functools.cache
def case(model: str, bias: bool) -> tuple[list[Any], Any, list[np.ndarray]]:
    """x, weights, w13, w2, biases of four experts; ids of three of them; y and the gradients by float64."""
    form = MODELS[model]
    x, ids, weights, w13, w2, dy = arrays(form)
    ids = jnp.where(ids < ROUTED, ids, -1)
    more = biases(form, w13, w2) if bias else ()
    every = jnp.concatenate([ids, jnp.full((x.shape[0], 1), ROUTED)], axis=1)
    ones = jnp.concatenate([weights, jnp.ones((x.shape[0], 1))], axis=1)
    y, dx, dweights, *rest = float64(form, x, every, ones, w13, w2, dy, *more)
    return [x, weights, w13, w2, *more], (ids, dy), [y, dx, dweights[:, :-1], *rest]


def last(layer: Any, form: ExpertForm, recipe: str, ids: Any) -> Any:
    def run(x: Any, weights: Any, w13: Any, w2: Any, b13: Any = None, b2: Any = None) -> jax.Array:
        ids_too = jnp.where(ids < 0, ROUTED, ids)  # no id goes to a shared expert
        return layer(x, ids_too, weights, w13, w2, b13=b13, b2=b2, shared=1, form=form, recipe=recipe)

    return run


def own(layer: Any, form: ExpertForm, recipe: str, ids: Any) -> Any:
    def run(x: Any, weights: Any, *arrays: Any) -> jax.Array:
        (w13, w2, *more), shared = (
            [a[part] for a in arrays] for part in (slice(ROUTED), slice(ROUTED, None))
        )
        named = dict(zip(("b13", "b2"), more, strict=False))
        return layer(
            x, ids, weights, w13, w2, **named, shared=SharedExperts(*shared), form=form, recipe=recipe
        )

    return run


CASES = [
    (last, moe_mlp, "llama4", False, "fp8"),
    (last, moe_mlp, "gpt-oss", True, "bf16"),
    (own, moe_mlp, "gpt-oss", True, "fp8"),
    (own, moe_mlp, "llama4", False, "bf16"),
    (own, over_mesh, "qwen3", False, "fp8"),
    (own, over_mesh, "nemotron3", True, "bf16"),
]


@pytest.mark.parametrize(("way", "layer", "model", "bias", "recipe"), CASES)
def test_forward_and_gradients(way, layer, model, bias, recipe):
    args, (ids, dy), want = case(model, bias)
    run = way(layer, MODELS[model], recipe, ids)
    got = pull(run, *args, by=dy)
    assert worst(got, want) < 1.1 * bound(recipe, MODELS[model])
    if layer is moe_mlp:
        few = jax.jit(way(moe_mlp_decode, MODELS[model], recipe, ids))(*args)
        assert relative(few, want[0]) < bound(recipe, MODELS[model])


def qwen2() -> tuple[list[Any], Any, list[np.ndarray]]:
    """x, w13, w2 and gate of a shared expert of another inner size than the experts', dy; y and gradients."""
    x, ids, _, w13, w2, dy = arrays(ExpertForm(), (24, 128, 256, 1, 1))
    gate = jnp.asarray(np.random.default_rng(8).standard_normal(128), F32) / 8
    opened = 1 / (1 + np.exp(-wide(x) @ wide(gate)))[:, None]
    y, dx, dopened, dw13, dw2 = float64(ExpertForm(), x, jnp.zeros_like(ids), opened, w13, w2, dy)
    dlogits = dopened * opened * (1 - opened)
    wanted = [y, dx + dlogits * wide(gate), dw13[0], dw2[0], (dlogits * wide(x)).sum(axis=0)]
    return [x, w13[0], w2[0], gate], dy, wanted


@both
def test_a_gate_and_another_inner_size(recipe):
    (x, *shared), dy, want = qwen2()
    _, ids, weights, w13, w2, _ = arrays(ExpertForm())

    def run(x: Any, w13_: Any, w2_: Any, gate: Any) -> jax.Array:
        nowhere, own = jnp.full_like(ids, -1), SharedExperts(w13_, w2_, gate=gate)
        return moe_mlp(x, nowhere, weights, w13, w2, shared=own, recipe=recipe)

    assert worst(pull(run, x, *shared, by=dy), want) < bound(recipe, ExpertForm())


def test_several_are_summed_and_vmap_is_a_loop():
    x, ids, weights, w13, w2, _ = arrays(ExpertForm())
    ids = jnp.where(ids < 2, ids, -1)
    stacked = moe_mlp(x, ids, weights, w13, w2, shared=2, recipe="bf16")
    shared = SharedExperts((w13[2:, :128], w13[2:, 128:]), w2[2:])

    @jax.jit
    def run(x: Any, gate: Any) -> jax.Array:
        own = SharedExperts(shared.w13, shared.w2, gate=gate)
        return moe_mlp(x, ids, weights, w13[:2], w2[:2], shared=own, recipe="bf16")

    assert relative(run(x, None), stacked) < 0.01
    many, gates = jnp.stack([x, -x]), jnp.stack([x[0], x[1]])
    got = jax.vmap(run)(many, gates)
    np.testing.assert_array_equal(wide(got), [wide(run(*one)) for one in zip(many, gates, strict=True)])


def test_prepared_and_frozen_weights():
    x, ids, weights, w13, w2, dy = arrays(ExpertForm())
    first, second = prepare_weights(w13[3], w2[3])

    def run(x: Any, w13_: Any, w2_: Any) -> jax.Array:
        return moe_mlp(x, ids, weights, w13, w2, shared=SharedExperts(w13_, w2_))

    want = pull(run, x, w13[3], w2[3], by=dy)
    got = pull(lambda x, a, b: run(x, first.with_master(a), second.with_master(b)), x, w13[3], w2[3], by=dy)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(wide(one), wide(other))
    frozen = [quantize(w[3], (128, 128)) for w in (w13, w2)]
    np.testing.assert_array_equal(wide(jax.jit(run)(x, *frozen)), wide(want[0]))


@pytest.mark.parametrize("layer", [moe_mlp, moe_mlp_decode])
def test_on_explicit_axes(layer):
    """Tokens stay where they are; shared weights are gathered, and their gradients cut as they are."""
    x, ids, weights, w13, w2, dy = arrays(ExpertForm())
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def run(x: Any, s13: Any, s2: Any, ids: Any, weights: Any) -> jax.Array:
        y = layer(x, ids, weights, w13, w2, shared=SharedExperts(s13, s2), recipe="bf16")
        return y + layer(x, ids, weights, w13, w2, shared=1, recipe="bf16")

    specs = (P("data"), P("model"), P(None, "model"))
    cut = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((x, w13[3], w2[3]), specs, strict=True)]
    routed = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (ids, weights)]
    by = jax.device_put(dy, NamedSharding(mesh, P("data", None)))
    with jax.set_mesh(mesh):
        got = pull(lambda *args: run(*args, *routed), *cut, by=by)
    want = pull(lambda *args: run(*args, ids, weights), x, w13[3], w2[3], by=dy)
    assert worst(got, want) < 1e-2
    assert got[0].sharding.spec[0] == "data"
    for gradient, array in zip(got[1:], cut, strict=True):
        assert gradient.sharding.is_equivalent_to(array.sharding, array.ndim)


X, IDS, WEIGHTS, W13, W2, _ = arrays(ExpertForm())


def called(shared: Any, layer: Any = moe_mlp, **options: Any) -> jax.Array:
    return layer(X, IDS, WEIGHTS, W13, W2, shared=shared, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: called(4), ValueError, r"moe_mlp: shared is 4 and w13 has 4 experts, need fewer"),
        (lambda: called((W13, W2)), TypeError, r"shared is a tuple, need SharedExperts\(w13, w2\)"),
        (
            lambda: called(SharedExperts(W13[0], W2[0, :, :64])),
            ValueError,
            r"moe_mlp \(shared\): .*w2 is \[1, 128, 64\]",
        ),
        (
            lambda: called(SharedExperts(W13[0], W2[0], gate=W13[0, :1])),
            ValueError,
            r"gate is float32 \[1, 128\], need bfloat16 or float32 \[128\].*take gate\[0\]",
        ),
        (
            lambda: called(SharedExperts(W13[0], W2[0], b13=W2[0, 0])),
            ValueError,
            r"moe_mlp \(shared\): b13 is float32 \[1, 128\]",
        ),
        (
            lambda: called(1, moe_mlp_decode, max_rows=4),
            ValueError,
            r"max_rows is 4 and shared is 1.*need as many rows: max_rows=None.*SharedExperts",
        ),
        (
            lambda: called(1, over_mesh),
            ValueError,
            r"moe_layer: shared is 1 of the last experts.*w13\[:-1\].*shared=SharedExperts\(w13\[-1:\]",
        ),
    ],
    ids=range(7),
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
