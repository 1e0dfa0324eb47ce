"""Experts as models have them, against every expert on every token in float64: forward and gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm import quantize
from jax_deepgemm.activation import GPT_OSS
from jax_deepgemm.moe import (
    ExpertForm,
    combine,
    dispatch,
    expert_mlp,
    moe_layer,
    moe_mlp,
    moe_mlp_decode,
    prepare_weights,
    spread_weights,
)
from tests.shared import op_checks
from tests.shared.expert_forms import MODELS, arrays, biases, bound, float64
from tests.shared.moe_oracle import pull, pull_stepwise, relative, wide

E = 4
every = pytest.mark.parametrize("model", MODELS)
both = pytest.mark.parametrize("recipe", ["fp8", "bf16"])


def over_mesh(*args: Any, **options: Any) -> jax.Array:
    return moe_layer(*args, mesh=op_checks.make_mesh("auto", (4,), ("expert",)), **options)[0]


def experts(x: Any, ids: Any, weights: Any, w13: Any, w2: Any, **options: Any) -> jax.Array:
    rows, plan = dispatch(x, ids, E)
    y = expert_mlp(rows, w13, w2, plan.group_sizes, spread_weights(weights, plan), **options)
    return combine(y, plan)


@functools.cache
def wanted(model: str) -> list[np.ndarray]:
    return float64(MODELS[model], *arrays(MODELS[model]))


FORMS = [(moe_mlp, model, recipe) for model in MODELS for recipe in ("fp8", "bf16")]
FORMS += [(experts, model, recipe) for model in ("gpt-oss", "llama4") for recipe in ("fp8", "bf16")]
FORMS += [(over_mesh, "gpt-oss", "bf16"), (over_mesh, "llama4", "fp8")]


@pytest.mark.any_version
@pytest.mark.parametrize(("layer", "model", "recipe"), FORMS)
def test_forward_and_gradients(layer, model, recipe):
    x, ids, weights, w13, w2, dy = arrays(MODELS[model])
    run = functools.partial(layer, recipe=recipe, form=MODELS[model])
    pulled = pull if layer is over_mesh else pull_stepwise
    got = pulled(lambda x, weights, *w: run(x, ids, weights, *w), x, weights, w13, w2, by=dy)
    errors = [relative(one, other) for one, other in zip(got, wanted(model), strict=True)]
    assert max(errors) < bound(recipe, MODELS[model]), errors
    assert [one.shape for one in got[3:]] == [w13.shape, w2.shape]


@pytest.mark.any_version
@both
@every
def test_decode(model, recipe):
    x, ids, weights, w13, w2, _ = arrays(MODELS[model])
    got = moe_mlp_decode(x, ids, weights, w13, w2, recipe=recipe, form=MODELS[model])
    assert relative(got, wanted(model)[0]) < bound(recipe, MODELS[model])


BIASED = [(moe_mlp, model, recipe) for model in ("gpt-oss", "nemotron3") for recipe in ("fp8", "bf16")]
BIASED += [(experts, "gpt-oss", "fp8"), (experts, "nemotron3", "bf16")]
BIASED += [(over_mesh, "gpt-oss", "fp8"), (over_mesh, "nemotron3", "bf16")]


@pytest.mark.any_version
@pytest.mark.parametrize(("layer", "model", "recipe"), BIASED)
def test_biases(layer, model, recipe):
    form = MODELS[model]
    x, ids, weights, w13, w2, dy = arrays(form)
    b13, b2 = biases(form, w13, w2)
    want = float64(form, x, ids, weights, w13, w2, dy, b13, b2)

    def run(x: Any, weights: Any, w13: Any, w2: Any, b13: Any, b2: Any) -> jax.Array:
        return layer(x, ids, weights, w13, w2, b13=b13, b2=b2, recipe=recipe, form=form)

    pulled = pull if layer is over_mesh else pull_stepwise
    got = pulled(run, x, weights, w13, w2, b13, b2, by=dy)
    errors = [relative(one, other) for one, other in zip(got, want, strict=True)]
    assert max(errors) < bound(recipe, form), errors
    assert [one.dtype for one in got[5:]] == [b13.dtype, b2.dtype]
    if layer is moe_mlp:
        few = moe_mlp_decode(x, ids, weights, w13, w2, b13=b13, b2=b2, recipe=recipe, form=form)
        assert relative(few, want[0]) < bound(recipe, form)


@pytest.mark.any_version
@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_bias_of_some_experts_and_rows_of_none(recipe):
    """With an offset; NaN behind the last group reaches no gradient."""
    form = ExpertForm("relu2")
    rows = jnp.ones((20, 128), jnp.bfloat16).at[16:].set(jnp.nan)
    w = jnp.full((2, 128, 128), 1 / 128, jnp.float32)
    b13, b2 = jnp.ones((2, 128)), jnp.array([[1.0], [10.0]]) * jnp.ones((1, 128))

    def run(b13: jax.Array, b2: jax.Array) -> jax.Array:
        sizes = jnp.array([4, 3, 0, 9], jnp.int32)
        return expert_mlp(rows, w, w, sizes, b13=b13, b2=b2, recipe=recipe, form=form, group_offset=1)

    y, db13, db2 = pull_stepwise(run, b13, b2, by=jnp.ones((20, 128), jnp.bfloat16).at[16:].set(jnp.nan))
    np.testing.assert_allclose(wide(y)[:, 0], [0] * 4 + [5] * 3 + [0] * 13, rtol=0.05)
    np.testing.assert_allclose(db13, [[3 * 4] * 128, [0] * 128], rtol=0.05)
    np.testing.assert_allclose(db2, [[3] * 128, [0] * 128], rtol=0.05)


@pytest.mark.any_version
@both
@pytest.mark.parametrize("model", ["qwen3", "gemma4"])
def test_two_arrays_are_one(model, recipe):
    form = MODELS[model]
    x, ids, weights, w13, w2, dy = arrays(form)
    axis = 1 if form.weight_layout == "nk" else 2

    def run(x: Any, pair: Any, w2: Any) -> jax.Array:
        return moe_mlp(x, ids, weights, pair, w2, recipe=recipe, form=form)

    y, dx, dw13, dw2 = pull_stepwise(run, x, w13, w2, by=dy)
    got = pull_stepwise(run, x, tuple(jnp.split(w13, 2, axis)), w2, by=dy)
    for one, other in zip((*got[:2], jnp.concatenate(got[2], axis), got[3]), (y, dx, dw13, dw2), strict=True):
        np.testing.assert_array_equal(wide(one), wide(other))


def test_prepared_weights_of_another_layout_and_of_two_arrays():
    form = MODELS["gemma4"]
    x, ids, weights, w13, w2, dy = arrays(form)

    def run(x: Any, pair: Any, w2: Any, prepare: bool) -> jax.Array:
        pair, w2 = prepare_weights(pair, w2, form=form) if prepare else (pair, w2)
        return moe_mlp(x, ids, weights, pair, w2, form=form)

    operands = x, tuple(jnp.split(w13, 2, 2)), w2
    one, other = (
        pull_stepwise(functools.partial(run, prepare=prepare), *operands, by=dy) for prepare in (True, False)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(wide(a), wide(b))


def test_frozen_weights():
    x, ids, weights, w13, w2, _ = arrays(MODELS["nemotron3"])
    frozen = (quantize(w, (128, 128)) for w in (w13, w2))
    got = moe_mlp(x, ids, weights, *frozen, form=MODELS["nemotron3"])
    assert relative(got, wanted("nemotron3")[0]) < bound("fp8", MODELS["nemotron3"])


@pytest.mark.any_version
def test_scales_are_powers_of_two():
    text = jax.jit(functools.partial(moe_mlp, form=MODELS["deepseek-v4"])).lower(
        *arrays(MODELS["deepseek-v4"])[:5]
    )
    ops = text.as_text(debug_info=True)
    assert "ue8m0" in ops
    assert "quantize_f32" not in ops


ARGS: Any = arrays(ExpertForm())[:5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moe_mlp(*ARGS, form=ExpertForm("relu2")), r"need \[.., h\], \[e, i, h\] and \[e, h, i\]"),
        (
            lambda: moe_mlp(*ARGS, form=ExpertForm(GPT_OSS, "kn")),
            r"\[e, h, 2 \* i\] \(gate and up in turns\) and \[e, i, h\]. ExpertForm says",
        ),
        (lambda: moe_mlp(*ARGS, form=ExpertForm("swish")), r"activation is 'swish'"),
        (lambda: moe_mlp(*ARGS, form=ExpertForm(weight_layout="nt")), r"weight_layout is 'nt', need 'nk'"),
        (lambda: moe_mlp(*ARGS, form=ExpertForm(scale_format="e8")), r"scale_format is 'e8', need 'f32'"),
        (
            lambda: moe_mlp(*ARGS, b13=jnp.ones((4, 128))),
            r"b13 is float32 \[4, 128\], need bfloat16 or float32 \[4, 256\]",
        ),
        (
            lambda: moe_mlp(*ARGS[:3], (ARGS[3], ARGS[3]), ARGS[4], form=ExpertForm(GPT_OSS)),
            r"w13 is 2 arrays and the activation is .*need one array",
        ),
        (
            lambda: moe_mlp(*ARGS[:3], (ARGS[3], ARGS[4]), ARGS[4]),
            r"w13 is \(gate float32 \[4, 256, 128\], up float32 \[4, 128, 128\]\)",
        ),
        (
            lambda: moe_mlp(
                *ARGS[:3],
                *(quantize(w.mT, (128, 128)) for w in ARGS[3:]),
                form=ExpertForm(weight_layout="kn"),
            ),
            r"w13 is quantised, and weight_layout is 'kn'.*quantize\(w13.mT, \(128, 128\)\)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
