"""weight_gradient="128x128": a scale for 128 rows and 128 features in an operand of the weight gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm import fp8_linear, grouped_linear
from jax_deepgemm.activation import GPT_OSS
from jax_deepgemm.moe import ExpertForm, moe_mlp, route
from jax_deepgemm.ops.grouped import op as ops
from jax_deepgemm.ops.grouped import recipe
from jax_deepgemm.ops.quantize.blocks import count_row_blocks
from tests.shared import op_checks
from tests.shared.moe_oracle import normal, relative

F32 = jnp.float32
SIZES = np.array([140, 0, 129, 3], np.int32)
ROWS, N, K = 300, 264, 200
SQUARE = recipe.LayerOptions(weight_gradient="128x128")


def on_one_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where all rows surely are, as on a machine with one device."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("one",))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))


def operands() -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, w, dy; NaN behind the last group."""
    tail = jnp.arange(ROWS)[:, None] >= SIZES.sum()
    x, dy = (jnp.where(tail, jnp.nan, normal(i, ROWS, cols)) for i, cols in ((0, K), (1, N)))
    return x, normal(2, len(SIZES), N, K, dtype=F32), dy


def exact(dy: Any, x: Any) -> np.ndarray:
    """[g, n, k] in float64."""
    dy, x = (np.asarray(one).astype(np.float64) for one in (dy, x))
    ends = np.cumsum(SIZES)
    return np.stack([dy[e - s : e].T @ x[e - s : e] for s, e in zip(SIZES, ends, strict=True)])


def gradient(x: Any, w: Any, dy: Any, **options: Any) -> jax.Array:
    @on_one_device
    def run(x: jax.Array, w: jax.Array, dy: jax.Array) -> jax.Array:
        layer = functools.partial(grouped_linear, out_dtype=F32, **options)
        return jax.vjp(lambda w: layer(x, w, jnp.asarray(SIZES)), w)[1](dy.astype(F32))[0]

    return run(x, w, dy)


@pytest.mark.any_version
@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_near_float64_in_either_layout(layout):
    x, w, dy = operands()
    dw = gradient(x, w if layout == "nk" else w.mT, dy, weight_layout=layout, weight_gradient="128x128")
    dw = np.asarray(dw if layout == "nk" else dw.mT)
    assert relative(dw, exact(dy, x)) < 0.05
    assert not dw[1].any()
    assert not np.array_equal(dw, gradient(x, w, dy))


@pytest.mark.any_version
def test_it_is_the_product_of_blocks():
    """That of quantised blocks of each group, which the dense product multiplies: the same but for sums."""
    x, w, dy = operands()
    dw = gradient(x, w, dy, weight_gradient="128x128")
    for group, (size, end) in enumerate(zip(SIZES, np.cumsum(SIZES), strict=True)):
        mine = (jnp.asarray(one[end - size : end].T) for one in (dy, x))
        a, b = (jdg.quantize(one, block) for one, block in zip(mine, ((1, 128), (128, 128)), strict=True))
        want = jdg.fp8_gemm_nt(a, b, out_dtype=F32)
        np.testing.assert_allclose(dw[group], want, rtol=0, atol=1e-4 * (1 + np.abs(want).max()))


@pytest.mark.any_version
def test_features_of_other_blocks_and_rows_of_other_groups_do_not_touch_it():
    """In a block, numbers down to 1 / 28,000 of the largest keep their precision; other blocks all bits."""
    x, w, dy = operands()
    plain = gradient(x, w, dy, weight_gradient="128x128")
    far = gradient(x.at[:140].multiply(1e6).at[:, 128:].multiply(1e6), w, dy, weight_gradient="128x128")
    np.testing.assert_array_equal(far[2:, :, :128], plain[2:, :, :128])
    near = gradient(x.at[:, 5].multiply(1e3), w, dy, weight_gradient="128x128")
    others = np.arange(K) != 5
    assert relative(np.asarray(near)[..., others], exact(dy, x)[..., others]) < 0.05


@pytest.mark.any_version
def test_one_op_for_scales_of_columns_and_of_blocks():
    rng, blocks = np.random.default_rng(0), count_row_blocks(ROWS, len(SIZES))
    a, b = (jnp.asarray(rng.standard_normal((rows, 128 * blocks)), jnp.float8_e4m3fn) for rows in (K, N))
    sa, sb = (jnp.asarray(rng.uniform(1, 2, (blocks, cols)), F32) for cols in (K, -(-N // 128)))
    c = jnp.asarray(rng.standard_normal((len(SIZES), K, N)), F32)
    where = (jnp.asarray(SIZES), jnp.zeros(1, jnp.int32))
    form = {"rows_format": "blocks", "num_groups": len(SIZES), "out_dtype": np.dtype("float32")}
    form |= {"reduce_dtype": np.dtype("float32"), "out_sharding": None, "config": None, "num_sms": None}
    wide = jnp.repeat(sb, 128, axis=1)[:, :N]
    [got] = jax.jit(lambda *x: ops.K_GROUPED_FP8_BLOCK_ADD(*x, **form))(a, sa, b, sb, *where, c)
    [want] = jax.jit(lambda *x: ops.K_GROUPED_FP8_ADD(*x, **form))(a, sa, b, wide, *where, c)
    np.testing.assert_array_equal(got, want)
    for spec in (P("x"), P(None, "x"), P("y", "x")):  # rows of b; k; both
        mesh = op_checks.make_mesh("auto")
        placed = jax.device_put(b, NamedSharding(mesh, spec))
        [cut] = jax.jit(lambda *x: ops.K_GROUPED_FP8_BLOCK(*x, **form))(a, sa, placed, sb, *where)
        np.testing.assert_allclose(cut, want - c, rtol=0, atol=1e-3)


@pytest.mark.any_version
@pytest.mark.parametrize("form", [ExpertForm(), ExpertForm(GPT_OSS, "kn")], ids=("qwen3", "gpt-oss"))
def test_experts(form):
    """Everything but the weights' gradients keeps its bits, those of biases too."""
    x, logits = normal(0, 200, 256), normal(1, 200, 4, dtype=F32)
    w13, w2 = (normal(i, 4, 256, cols, dtype=F32, scale=cols**-0.5) for i, cols in ((2, 256), (3, 128)))
    biases = []
    if form.weight_layout == "kn":
        w13, w2, biases = w13.mT, w2.mT, [normal(i, 4, 256, dtype=F32) for i in (5, 6)]

    def run(form: ExpertForm, kind: str) -> list[jax.Array]:
        def layer(x: jax.Array, w13: jax.Array, w2: jax.Array, *biases: jax.Array) -> jax.Array:
            given = dict(zip(("b13", "b2"), biases))
            return moe_mlp(x, *route(logits, 2), w13, w2, form=form, recipe=kind, **given)

        vjp = lambda *args: jax.vjp(layer, *args)[1](normal(4, 200, 256))  # noqa: E731
        return on_one_device(vjp)(x, w13, w2, *biases)

    square = ExpertForm(form.activation, form.weight_layout, weight_gradient="128x128")
    got, fp8, bf16 = run(square, "fp8"), run(form, "fp8"), run(form, "bf16")
    for i, (one, other, near) in enumerate(zip(got, fp8, bf16, strict=True)):
        assert np.array_equal(one, other) == (i not in (1, 2, 3) or (i == 3 and form.weight_layout == "nk"))
        assert relative(one, near) < 0.09


@pytest.mark.parametrize("spec", [P("x", "y"), P(None, "x")], ids=str)
def test_linear(spec):
    """Written out with the public operations; then tokens and features cut, also inside a block."""
    x, w, dy = normal(0, 512, 320), normal(1, 200, 320, dtype=F32), normal(2, 512, 200)
    vjp = jax.jit(lambda x: jax.vjp(lambda w: fp8_linear(x, w, weight_gradient="128x128"), w)[1](dy)[0])
    want = jdg.fp8_gemm_nt(jdg.quantize(dy.T), jdg.quantize(x.T, (128, 128)), out_dtype=F32)
    placed = jax.device_put(x, NamedSharding(op_checks.make_mesh("auto"), spec))
    for one in (x, placed):
        np.testing.assert_allclose(vjp(one), want, rtol=0, atol=1e-4)


def test_other_words_are_refused():
    x, w, sizes = jnp.ones((4, 128)), jnp.ones((1, 8, 128)), jnp.array([4])
    form = ExpertForm(weight_gradient="blocks")
    for call in (
        lambda: fp8_linear(x, w[0], weight_gradient="blocks"),
        lambda: grouped_linear(x, w, sizes, weight_gradient="blocks"),
        lambda: moe_mlp(x, sizes[:, None], jnp.ones((4, 1)), w.mT, w, form=form),
    ):
        with pytest.raises(ValueError, match=r"weight_gradient is 'blocks', need '1x128', or '128x128'"):
            call()
