"""Layers as other models have them, on an H200: activations, layouts of weights, against float64 and the
reference.

Run: pytest -m gpu tests/gpu/test_variants_gpu.py        (about two minutes, kernels compiled anew)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm import grouped_linear
from jax_deepgemm.activation import GPT_OSS, Activation, swiglu_grad_quantize, swiglu_quantize
from jax_deepgemm.moe import moe_mlp, moe_mlp_decode
from jax_deepgemm.ops.quantize.blocks import row_blocks
from jax_deepgemm.ops.quantize.problem import QuantizeProblem
from tests.gpu.test_fused_gpu import assert_bits, draw, near
from tests.gpu.test_groups_gpu import defined, used
from tests.shared.activations import ACTIVATIONS
from tests.shared.expert_forms import MODELS, arrays, biases, bound, float64
from tests.shared.moe_oracle import pull, relative

VARIANTS = {name: activation for name, activation in ACTIVATIONS.items() if activation.tag}
# Whole tiles, tails that are aligned, tails that are not, less than a tile, gpt-oss's width.
SHAPES = ((256, 128), (136, 392), (129, 131), (5, 8), (1, 1), (130, 2880))
TYPES = ("bfloat16", "float32")


def kernels() -> Iterator[QuantizeProblem]:
    """What the tables below need (kernels.py)."""
    for (m, i), x, a in itertools.product(SHAPES, TYPES, VARIANTS.values()):
        options = {"transposed": True, "weighted": True, "activation": a}
        yield QuantizeProblem("swiglu", m, i, x, **options)
        yield QuantizeProblem("swiglu_grad", m, a.halves * i, x, **options)


every = pytest.mark.parametrize("activation", VARIANTS.values(), ids=VARIANTS)


def operands(m: int, i: int, x: str, activation: Activation) -> tuple[np.ndarray, ...]:
    """h, weight, dact; numbers on both sides of every clip."""
    h = draw((m, activation.halves * i), x, spread=1)
    return h, draw((m,), "float32", 2, spread=0), draw((m, i), x, 1, spread=0.5)


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations(shape, activation):
    for x in TYPES:
        h, weight, dact = operands(*shape, x, activation)
        near(functools.partial(swiglu_quantize, activation=activation), h, weight)
        near(functools.partial(swiglu_grad_quantize, activation=activation), h, weight, dact)


@pytest.mark.smoke
@every
def test_rows_that_do_not_count_and_options(activation):
    """NaN behind a limit, no weights, powers of two, no transposed copy, several matrices."""
    h, weight, dact = operands(264, 264, "bfloat16", activation)
    for array in (h, weight, dact):
        array[200:] = np.nan
    forth, back = (
        functools.partial(f, activation=activation) for f in (swiglu_quantize, swiglu_grad_quantize)
    )
    near(forth, h, weight, np.int32(200))
    near(back, h, weight, dact, np.int32(200))
    plain = {"transposed": False, "scale_format": "ue8m0"}
    near(functools.partial(forth, **plain), h[:200])
    near(lambda h, d: back(h, None, d, **plain), h[:200], dact[:200])
    near(jax.vmap(forth, (0, None)), np.stack([h[:200], h[:200] * 2]), weight[:200])


@every
def test_blocks_that_begin_with_each_group(activation):
    h, weight, dact = operands(520, 256, "bfloat16", activation)
    sizes = np.array([130, 0, 1, 257, 40], np.int32)
    for array in (h, weight, dact):
        array[sizes.sum() :] = np.nan

    count = used(sizes, len(h))

    def run(h: jax.Array, weight: jax.Array, dact: jax.Array, sizes: jax.Array) -> list[jax.Array]:
        blocks = row_blocks(sizes, h.shape[0])
        forward = swiglu_quantize(h, weight, blocks=blocks, activation=activation)
        backward = swiglu_grad_quantize(h, weight, dact, blocks=blocks, activation=activation)
        return [*defined(count, forward), *defined(count, backward)]

    near(run, h, weight, dact, sizes)


@pytest.mark.parametrize("activation", [GPT_OSS, Activation("relu2"), Activation(limit=10.0)], ids=str)
def test_activations_repeat_their_bits(activation):
    h, weight, dact = operands(2000, 512, "bfloat16", activation)

    @jax.jit
    def step(h: jax.Array, weight: jax.Array, dact: jax.Array) -> list[jax.Array]:
        back = swiglu_grad_quantize(h, weight, dact, activation=activation)
        return [*swiglu_quantize(h, weight, activation=activation), *back]

    first = [np.asarray(part) for part in step(h, weight, dact)]
    for _ in range(20):
        noise = [jnp.full((1 << 20,), jnp.nan) for _ in range(4)]
        jax.block_until_ready(noise)
        del noise
        assert_bits([np.asarray(part) for part in step(h, weight, dact)], first)


# Layers -------------------------------------------------------------------------------------------------

SIZES = ((300, 256, 384, 8, 2), (77, 520, 200, 5, 3))
"""Whole blocks; tails everywhere."""


@pytest.mark.smoke
@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_models(model, recipe):
    """Forward, gradients and decoding, against float64; twice, with the same bits."""
    form = MODELS[model]
    for sizes in SIZES:
        x, ids, weights, w13, w2, dy = arrays(form, sizes)
        want = float64(form, x, ids, weights, w13, w2, dy)
        run = functools.partial(moe_mlp, recipe=recipe, form=form)

        def layer(x, weights, w13, w2, ids=ids, run=run):
            return run(x, ids, weights, w13, w2)

        got, again = (pull(layer, x, weights, w13, w2, by=dy) for _ in range(2))
        errors = [relative(one, other) for one, other in zip(got, want, strict=True)]
        assert max(errors) < bound(recipe, form), (sizes, errors)
        for one, other in zip(got, again, strict=True):
            assert_bits([np.asarray(one, np.float32)], [np.asarray(other, np.float32)])
        few = jax.jit(functools.partial(moe_mlp_decode, recipe=recipe, form=form))(x, ids, weights, w13, w2)
        assert relative(few, want[0]) < bound(recipe, form)


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
@pytest.mark.parametrize("model", ["gpt-oss", "nemotron3"])
def test_biases(model, recipe):
    form = MODELS[model]
    for sizes in SIZES:
        x, ids, weights, w13, w2, dy = arrays(form, sizes)
        b13, b2 = biases(form, w13, w2)
        want = float64(form, x, ids, weights, w13, w2, dy, b13, b2)

        def layer(x, weights, w13, w2, b13, b2, ids=ids):
            return moe_mlp(x, ids, weights, w13, w2, b13=b13, b2=b2, recipe=recipe, form=form)

        got, again = (pull(layer, x, weights, w13, w2, b13, b2, by=dy) for _ in range(2))
        errors = [relative(one, other) for one, other in zip(got, want, strict=True)]
        assert max(errors) < bound(recipe, form), (sizes, errors)
        for one, other in zip(got, again, strict=True):
            assert_bits([np.asarray(one, np.float32)], [np.asarray(other, np.float32)])
        few = jax.jit(functools.partial(moe_mlp_decode, recipe=recipe, form=form))
        assert relative(few(x, ids, weights, w13, w2, b13=b13, b2=b2), want[0]) < bound(recipe, form)


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_grouped_linear_of_either_layout(recipe):
    """The bits of the other layout in FP8, whose copies are the same; in BF16 another kernel's sums."""
    x, w = (
        jnp.asarray(draw((300, 264), spread=0.5)),
        jnp.asarray(draw((4, 200, 264), "float32", 1, spread=0.5)),
    )
    sizes, dy = jnp.array([130, 0, 1, 150], jnp.int32), jnp.asarray(draw((300, 200), seed=2, spread=0))

    def run(x: jax.Array, w: jax.Array, layout: str) -> jax.Array:
        return grouped_linear(x, w, sizes, recipe=recipe, weight_layout=layout)

    y, dx, dw = pull(functools.partial(run, layout="nk"), x, w, by=dy)
    got = pull(functools.partial(run, layout="kn"), x, w.mT, by=dy)
    for one, other in zip((*got[:2], got[2].mT), (y, dx, dw), strict=True):
        assert relative(one, other) < (1e-6 if recipe == "fp8" else 2e-3)
