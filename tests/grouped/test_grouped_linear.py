"""grouped_linear: values and gradients near float32, the documented recipe bit for bit, transformations."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm import grouped_linear
from jax_deepgemm.ops.grouped.linear import GROUPED_ACT_FP8, GROUPED_OUT, GROUPED_WEIGHT_FP8
from tests.shared import op_checks
from tests.shared.cases import BLOCK
from tests.shared.moe_oracle import normal, pull, relative, wide

BF16, F32 = jnp.bfloat16, jnp.float32
SIZES = jnp.array([37, 0, 130, 1, 64], jnp.int32)
M, N, K, G = 250, 136, 200, 5  # 18 rows of tail


def exact(x: Any, w: Any, dy: Any, sizes: Any = SIZES, first: int = 0) -> list[np.ndarray]:
    """y, dx, dw in float64, group by group."""
    x, w, dy = map(wide, (x, w, dy))
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    ends = np.cumsum(sizes)
    for group in range(len(w)):
        rows = slice(ends[group + first] - sizes[group + first], ends[group + first])
        y[rows], dx[rows] = x[rows] @ w[group].T, dy[rows] @ w[group]
        dw[group] = dy[rows].T @ x[rows]
    return [y, dx, dw]


def operands(*dtypes: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    return normal(0, M, K, dtype=dtypes[0]), normal(1, G, N, K, dtype=dtypes[1]), normal(2, M, N)


@functools.cache
def pulled(recipe: str, x_dtype: Any = BF16, w_dtype: Any = F32) -> Any:
    """y, dx, dw."""
    x, w, dy = operands(x_dtype, w_dtype)
    return pull(lambda x, w: grouped_linear(x, w, SIZES, recipe=recipe), x, w, by=dy)


@pytest.mark.parametrize(
    ("recipe", "dtypes"), [("fp8", (BF16, F32)), ("fp8", (F32, BF16)), ("bf16", (F32, F32))], ids=str
)
def test_near_float64(recipe, dtypes):
    x, w, dy = operands(*dtypes)
    got = pulled(recipe, *dtypes)
    for one, want in zip(got, exact(x, w, dy), strict=True):
        assert relative(one, want) < (0.05 if recipe == "fp8" else 0.005)
    assert [z.dtype for z in got] == [BF16, *dtypes]
    assert not np.any(wide(got[0][232:]))
    assert not np.any(wide(got[1][232:]))
    assert not np.any(wide(got[2][1]))


def test_recipe_is_the_documented_one():
    """The three GEMMs, written out with the public operations: equal bits."""
    x, w, dy = operands(BF16, F32)
    counted = jnp.arange(M)[:, None] < SIZES.sum()
    q, gemm = jdg.quantize, functools.partial(jdg.m_grouped_fp8_gemm_nt_contiguous, group_sizes=SIZES)

    @jax.jit
    def written_out(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        pair = (q(jnp.where(counted, z, 0).T) for z in (dy, x))
        dw = jdg.k_grouped_fp8_gemm_nt_contiguous(*pair, SIZES)
        return gemm(q(x), q(w, BLOCK)), gemm(q(dy), q(w.mT, BLOCK)), dw

    op_checks.assert_same(pulled("fp8"), written_out(x, w, dy), 0)


def test_tail_rows_touch_nothing():
    """NaN and huge numbers behind the last group: no other number changes, in any direction."""
    x, w, dy = operands(BF16, F32)
    bad = jnp.where(jnp.arange(M) % 2 == 0, jnp.nan, 1e30).astype(BF16)[:, None]
    tail = jnp.arange(M)[:, None] >= SIZES.sum()
    x, dy = (jnp.where(tail, bad, z) for z in (x, dy))
    got = pull(lambda x, w: grouped_linear(x, w, SIZES), x, w, by=dy)
    op_checks.assert_same(got, pulled("fp8"), 0)


def test_frozen_weight():
    x, w, dy = operands(BF16, F32)
    frozen = jdg.quantize(w, BLOCK)
    got = pull(lambda x: grouped_linear(x, frozen, SIZES), x, by=dy)
    op_checks.assert_same(got, pulled("fp8")[:2], 0)
    rows = jdg.quantize(w, (1, 128))
    y = jax.jit(lambda x: grouped_linear(x, rows, SIZES))(x)
    assert relative(y, exact(x, w, dy)[0]) < 0.05
    with pytest.raises(ValueError, match=r"has block \(1, 128\)"):
        jax.grad(lambda x: grouped_linear(x, rows, SIZES).astype(F32).sum())(x)


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_group_offset(recipe):
    """Two of five groups: rows of the others are zero and give nothing."""
    x, w, dy = operands(BF16, F32)
    layer = lambda x, w: grouped_linear(x, w, SIZES, group_offset=jnp.int32(2), recipe=recipe)  # noqa: E731
    got = pull(layer, x, w[2:4], by=dy)
    for one, want in zip(got, exact(x, w[2:4], dy, first=2), strict=True):
        assert relative(one, want) < (0.05 if recipe == "fp8" else 0.005)


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_sizes_of_more_groups_than_weights(recipe):
    x, w = jnp.ones((6, 128), BF16), jnp.ones((2, 16, 128), F32)
    y = grouped_linear(x, w, jnp.array([2, 1, 3], jnp.int32), recipe=recipe)
    np.testing.assert_array_equal(np.asarray(y[:, 0], np.float32), [128, 128, 128, 0, 0, 0])
    with pytest.raises((TypeError, ValueError), match=r"group_offset.*need an int32"):
        grouped_linear(x, w, jnp.array([2, 1, 3], jnp.int32), recipe=recipe, group_offset=1.7)


def test_other_group_sizes_do_not_compile_again():
    x, w, _ = operands(BF16, F32)
    traces = []

    @jax.jit
    def step(x: jax.Array, w: jax.Array, sizes: jax.Array) -> Any:
        traces.append(sizes)
        return jax.grad(lambda w: grouped_linear(x, w, sizes).astype(F32).sum())(w)

    for sizes in (SIZES, SIZES[::-1], jnp.array([M, 0, 0, 0, 0], jnp.int32)):
        want = exact(x, w, np.ones((M, N)), np.asarray(sizes))[2]
        assert relative(step(x, w, sizes), want) < 0.05
    assert len(traces) == 1


def test_what_is_kept_is_fp8():
    x, w, _ = operands(BF16, BF16)
    _, vjp = jax.vjp(jax.jit(lambda x, w: grouped_linear(x, w, SIZES)), x, w)
    big = [leaf for leaf in jax.tree.leaves(vjp) if getattr(leaf, "size", 0) >= M * K]
    assert sorted(leaf.shape for leaf in big) == [(G, K, N), (K, M)]
    assert all(leaf.dtype == jnp.uint8 for leaf in big)


def gemms(function: Any, *args: Any) -> int:
    text = str(jax.make_jaxpr(function)(*args))
    return text.count("= m_grouped_fp8_gemm") + text.count("= k_grouped_fp8_gemm")


def test_remat():
    """What a policy names is not computed twice; saved FP8 values survive jax.checkpoint."""
    x, w, dy = operands(BF16, F32)
    saved = jax.checkpoint_policies.save_only_these_names(GROUPED_OUT, GROUPED_ACT_FP8, GROUPED_WEIGHT_FP8)
    run = lambda x, w: grouped_linear(x, w, SIZES)  # noqa: E731
    for policy, count in ((None, 4), (saved, 3)):
        layer = jax.checkpoint(lambda x, w: jnp.sin(run(x, w)), policy=policy)
        loss = lambda x, w, layer=layer: layer(x, w).astype(F32).sum()  # noqa: E731
        assert gemms(jax.grad(loss, (0, 1)), x, w) == count
    op_checks.assert_same(pull(jax.checkpoint(run, policy=saved), x, w, by=dy), pulled("fp8"), 0)


def test_vmap():
    x, w, dy = (normal(i, 2, *shape) for i, shape in enumerate([(24, 128), (3, 64, 128), (24, 64)]))
    sizes = jnp.array([[8, 3, 13], [0, 20, 2]], jnp.int32)

    def run(x: jax.Array, w: jax.Array, sizes: jax.Array, dy: jax.Array) -> Any:
        y, vjp = jax.vjp(lambda x, w: grouped_linear(x, w, sizes), x, w)
        return y, *vjp(dy)

    alone = jax.jit(run)
    each = [alone(*z) for z in zip(x, w, sizes, dy, strict=True)]
    together = jax.jit(jax.vmap(run))(x, w, sizes, dy)
    op_checks.assert_same(together, jax.tree.map(lambda *z: jnp.stack(z), *each), 1e-2)


CUT = normal(0, 256, 256, dtype=F32), normal(1, 8, 256, 256, dtype=F32, scale=1 / 16)
CUT_SIZES = jnp.array([30, 0, 60, 40, 26, 50, 1, 40], jnp.int32)


def whole(x: jax.Array, w: jax.Array, **options: Any) -> jax.Array:
    return grouped_linear(x, w, CUT_SIZES, out_dtype=F32, **options)


def gradients(function: Any, *args: jax.Array) -> Any:
    return jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(function(x, w))), (0, 1)))(*args)


@functools.cache
def on_one_device() -> Any:
    return gradients(whole, *CUT)


@pytest.mark.parametrize(
    ("mode", "cut"),
    [
        ("auto", "m"),
        ("explicit", "n"),
        ("shard_map", "g"),
    ],
)
def test_sharded_gradients(mode, cut):
    """Tokens, features, or (by group_offset inside shard_map) groups over devices."""
    x_spec, w_spec, y_spec = {
        "m": (P("y"), P(), P("y", None)),
        "n": (P(), P(None, "y"), P(None, "y")),
        "g": (P(), P("y"), P()),
    }[cut]
    mesh = op_checks.make_mesh(mode)
    function = functools.partial(whole, out_sharding=y_spec) if mode == "explicit" else whole
    if mode == "shard_map":

        def local(x: jax.Array, w: jax.Array) -> jax.Array:
            return jax.lax.psum(whole(x, w, group_offset=2 * jax.lax.axis_index("y")), "y")

        function = jax.shard_map(local, mesh=mesh, in_specs=(x_spec, w_spec), out_specs=y_spec)
    placed = [jax.device_put(z, NamedSharding(mesh, s)) for z, s in zip(CUT, (x_spec, w_spec))]
    with jax.set_mesh(mesh):
        got = gradients(function, *placed)
    for one, other, where in zip(got, on_one_device(), placed, strict=True):
        assert relative(one, other) < (0.06 if mode == "shard_map" else 1e-3)
        if mode == "explicit":
            assert one.sharding.is_equivalent_to(where.sharding, one.ndim)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": jnp.ones((4, 3), BF16)}, r"x is \[4, 3\] and w is \[2, 8, 16\]"),
        ({"x": jnp.ones((1, 4, 16), BF16)}, "need 2 dimensions"),
        ({"w": jnp.ones((8, 16), BF16)}, r"w is \[8, 16\], need \[groups, n, k\]"),
        ({"group_sizes": jnp.ones(1, jnp.int32)}, r"group_sizes are \[1\] for 2 weights"),
        ({"group_sizes": jnp.ones(2)}, "group_sizes are float32"),
        ({"recipe": "int8"}, "recipe is 'int8'"),
        ({"w": jdg.quantize(jnp.ones((2, 8, 16)), (1, 16))}, r"block \(1, 16\)"),
        ({"w": jdg.quantize(jnp.ones((2, 8, 16)), BLOCK), "recipe": "bf16"}, "w is quantised and recipe"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors(change, words):
    call = {"x": jnp.ones((4, 16), BF16), "w": jnp.ones((2, 8, 16)), "group_sizes": jnp.ones(2, jnp.int32)}
    with pytest.raises(ValueError, match=words):
        grouped_linear(**{**call, **change})


def test_integers_are_refused():
    with pytest.raises(TypeError, match="x is int32"):
        grouped_linear(jnp.ones((4, 16), jnp.int32), jnp.ones((2, 8, 16)), jnp.ones(2, jnp.int32))
