"""fp8_linear: values and gradients near float32, what it keeps, how it goes through transformations."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm import fp8_linear
from jax_deepgemm.ops.gemm.linear import ACT_FP8, LINEAR_OUT, WEIGHT_FP8
from tests.shared import gemm_oracle as oracle
from tests.shared import op_checks
from tests.shared.arrays import normal
from tests.shared.cases import BLOCK
from tests.shared.op_checks import OpCase, Shard

BF16, F32 = jnp.bfloat16, jnp.float32
TOLERANCE = 1e-3


def pull(function: Any, *args: Any) -> Any:
    """function(*args[:-1]), and the operands' gradients for args[-1], in one program."""

    def run(*args: Any) -> Any:
        y, vjp = jax.vjp(function, *args[:-1])
        return y, *vjp(args[-1])

    return jax.jit(run)(*args)


def exact(x: Any, w: Any, dy: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, dx, dw in float64."""
    x, w, dy = (np.asarray(z).astype(np.float64) for z in (x, w, dy))
    dw = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return x @ w.T, dy @ w, dw


@pytest.mark.parametrize(
    ("lead", "dtypes"),
    [
        ((64,), (BF16, BF16)),
        ((3, 50), (BF16, F32)),
        ((2, 3, 7), (F32, BF16)),
        ((1,), (F32, F32)),
        ((), (BF16, F32)),
    ],
    ids=str,
)
def test_near_float32(lead, dtypes):
    x, w, dy = (
        normal(0, *lead, 300, dtype=dtypes[0]),
        normal(1, 200, 300, dtype=dtypes[1]),
        normal(2, *lead, 200),
    )
    got = pull(fp8_linear, x, w, dy)
    for one, want in zip(got, exact(x, w, dy), strict=True):
        assert one.shape == want.shape
        assert oracle.calc_diff(one, want) < TOLERANCE
    assert [z.dtype for z in got] == [BF16, *dtypes]


@pytest.mark.parametrize(
    "options",
    [
        {"out_dtype": F32},
        {"scale_format": "ue8m0"},
        {"grad_dtype": jnp.float8_e5m2},
        {"num_sms": 100},
        {"reduce_dtype": BF16},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options(options):
    x, w = normal(0, 64, 256), normal(1, 128, 256)
    dy = normal(2, 64, 128, dtype=options.get("out_dtype", BF16))
    got = pull(functools.partial(fp8_linear, **options), x, w, dy)
    assert got[0].dtype == options.get("out_dtype", BF16)
    bound = 4 * TOLERANCE if "grad_dtype" in options else TOLERANCE
    for one, want in zip(got, exact(x, w, dy), strict=True):
        assert oracle.calc_diff(one, want) < bound


def test_recipe_is_the_documented_one():
    """The three GEMMs, written out with the public operations: equal bits."""
    x, w, dy = normal(0, 96, 384), normal(1, 200, 384, dtype=F32), normal(2, 96, 200)
    y, vjp = jax.vjp(fp8_linear, x, w)
    dx, dw = vjp(dy)
    q = functools.partial(jdg.quantize)
    np.testing.assert_array_equal(y, jdg.fp8_gemm_nt(q(x), q(w, BLOCK)))
    np.testing.assert_array_equal(dx, jdg.fp8_gemm_nt(q(dy), q(w.T, BLOCK)))
    np.testing.assert_array_equal(dw, jdg.fp8_gemm_nt(q(dy.T), q(x.T), out_dtype=F32))


def test_what_is_kept_is_fp8():
    """Of x only one byte per element (and scales) waits for the backward pass."""
    x, w = normal(0, 256, 512), normal(1, 128, 512)
    _, vjp = jax.vjp(fp8_linear, x, w)
    kept = [leaf for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "nbytes")]
    big = [leaf for leaf in kept if leaf.size >= 128 * 512]
    assert sorted(leaf.shape for leaf in big) == [(512, 128), (512, 256)]
    assert all(leaf.dtype == jnp.uint8 for leaf in big)


@pytest.mark.parametrize("lead", [(0,), (0, 4), (4, 0)], ids=str)
def test_no_tokens(lead):
    x, w = jnp.zeros((*lead, 256), BF16), normal(1, 128, 256, dtype=F32)
    y, vjp = jax.vjp(fp8_linear, x, w)
    dx, dw = vjp(y)
    assert y.shape == (*lead, 128)
    assert dx.shape == x.shape
    assert dw.dtype == F32
    assert not np.any(np.asarray(dw))


def test_frozen_weight():
    x, w, dy = normal(0, 5, 30, 256), normal(1, 128, 256), normal(2, 5, 30, 128)
    frozen = jdg.quantize(w, BLOCK)
    y, vjp = jax.vjp(lambda x: fp8_linear(x, frozen), x)
    trained, trained_vjp = jax.vjp(fp8_linear, x, w)
    np.testing.assert_array_equal(y, trained)
    np.testing.assert_array_equal(vjp(dy)[0], trained_vjp(dy)[0])
    rows = jdg.quantize(w, (1, 128))
    assert oracle.calc_diff(fp8_linear(x, rows), exact(x, w, dy)[0]) < TOLERANCE
    zero = jax.grad(lambda s: fp8_linear(x, frozen.with_scales(s)).astype(F32).sum())(frozen.scales)
    assert not np.any(np.asarray(zero))


def test_frozen_weight_keeps_nothing_of_x():
    x, frozen = normal(0, 64, 512), jdg.quantize(normal(1, 128, 512), BLOCK)
    _, vjp = jax.vjp(lambda x: fp8_linear(x, frozen), x)
    assert all(leaf.shape != (512, 64) for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "shape"))


def primitives(function: Any, *args: Any) -> Counter[str]:
    """How often each primitive stands in the jaxpr, nested ones included."""
    found: Counter[str] = Counter()

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            found[equation.primitive.name] += 1
            for value in jax.tree.leaves(
                tuple(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def gemms(function: Any, *args: Any) -> int:
    return sum(n for name, n in primitives(function, *args).items() if name.startswith("fp8_gemm"))


REMAT = normal(0, 32, 256), normal(1, 128, 256)


def of_sine(function: Any) -> Any:
    """The gradients of x and w of the sum of its sine."""
    return jax.grad(lambda x, w: jnp.sin(function(x, w).astype(F32)).sum(), (0, 1))


@functools.cache
def without_remat() -> Any:
    return jax.jit(of_sine(fp8_linear))(*REMAT)


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (None, 4),
        ((), 4),
        ((LINEAR_OUT,), 3),
        ((LINEAR_OUT, ACT_FP8), 3),
        ((LINEAR_OUT, ACT_FP8, WEIGHT_FP8), 3),
    ],
    ids=str,
)
def test_remat_policies_count_gemms(names, count):
    policy = None if names is None else jax.checkpoint_policies.save_only_these_names(*names)
    layer = jax.checkpoint(lambda x, w: jnp.sin(fp8_linear(x, w).astype(F32)), policy=policy)
    grad = jax.grad(lambda x, w: layer(x, w).sum(), (0, 1))
    assert gemms(grad, *REMAT) == count
    for one, other in zip(jax.jit(grad)(*REMAT), without_remat(), strict=True):
        assert oracle.calc_diff(one, other) < 1e-4


@pytest.mark.parametrize("policy", ["everything_saveable", "dots_saveable", "nothing_saveable"])
@pytest.mark.parametrize("frozen", [False, True], ids=("", "frozen"))
def test_saved_values_from_256_on_survive(policy, frozen):
    """jax.checkpoint rounds what it saves by reduce_precision: 256..448 of e4m3 would become infinities."""
    x, w = REMAT
    run = lambda x: fp8_linear(x, jdg.quantize(w, BLOCK) if frozen else w).astype(F32)  # noqa: E731
    layer = jax.checkpoint(run, policy=getattr(jax.checkpoint_policies, policy))
    got = jax.jit(jax.grad(lambda x: jnp.sin(layer(x)).sum()))(x)
    assert oracle.calc_diff(got, without_remat()[0]) < 1e-4  # frozen or not: test_frozen_weight


def test_saved_residuals_are_not_quantised_twice():
    x, w = normal(0, 32, 256), normal(1, 128, 256)
    count = {}
    for names in ((LINEAR_OUT,), (LINEAR_OUT, ACT_FP8, WEIGHT_FP8)):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        layer = jax.checkpoint(lambda x, w: fp8_linear(x, w).astype(F32), policy=policy)
        found = primitives(jax.grad(lambda x, w: layer(x, w).sum(), (0, 1)), x, w)  # noqa: B023
        count[names] = sum(n for name, n in found.items() if name.startswith("quantize"))
    assert list(count.values()) == [5, 3]


def test_only_the_asked_gradient_is_computed():
    x, w = normal(0, 32, 256), normal(1, 128, 256)
    loss = lambda x, w: fp8_linear(x, w).astype(F32).sum()  # noqa: E731
    hlo = jax.jit(jax.grad(loss)).lower(x, w).compile().as_text()
    assert hlo.count(" dot(") <= 2


def layer(x: jax.Array, w: jax.Array, out_sharding: Any = None) -> jax.Array:
    return fp8_linear(x, w, out_dtype=F32, out_sharding=out_sharding)


def plain(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("...k,nk->...n", x, w)


def args(*lead: int, n: int = 512, k: int = 512) -> Any:
    def make(seed: int) -> list[jax.Array]:
        return [normal(seed, *lead, k, dtype=F32), normal(seed + 1000, n, k, dtype=F32, scale=1 / 32)]

    return make


CASES = [
    OpCase(
        "linear",
        layer,
        args(16, k=256, n=256),
        nests=(((0, None),), ((0, 0),), ((0, None), (1, 0))),
        plain=plain,
        wrt=(0, 1),
        tolerance=1e-4,
        grad_tolerance=0.15,
    ),
    OpCase(
        "linear-2d",
        layer,
        args(16),
        shards=(
            Shard((P("x"), P()), P("x")),
            Shard((P("x"), P("y")), P("x", "y"), modes=("explicit", "shard_map")),
            Shard((P("x", "y"), P(None, "y")), P("x"), ("all-reduce",), ("explicit",)),
            Shard((P("x", "y"), P(None, "y")), P("x", "y"), ("reduce-scatter",), ("explicit",)),
        ),
        tolerance=1e-4,
    ),
    OpCase(
        "linear-3d",
        layer,
        args(4, 8, n=512, k=512),
        shards=(
            Shard((P("x"), P("y")), P("x", None, "y"), modes=("explicit", "shard_map")),
            Shard((P("x", "y"), P()), P("x", "y"), modes=("explicit", "shard_map")),
            Shard((P(None, "y"), P("x")), P(None, "y", "x"), modes=("explicit",)),
            Shard((P("x", None, "y"), P(None, "y")), P("x"), ("all-reduce",), ("explicit",)),
        ),
        tolerance=1e-4,
    ),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check):
    check()


@functools.cache
def unsharded_gradients(lead: tuple[int, ...]) -> Any:
    """x, w, and the gradients of the sum of the layer's sine."""
    x, w = normal(0, *lead, 512, dtype=F32), normal(1, 512, 512, dtype=F32)
    return x, w, jax.jit(of_sine(layer))(x, w)


def sharded_gradients(mode: str, x_spec: P, w_spec: P, y_spec: P, lead: tuple[int, ...] = (32,)) -> Any:
    """Gradients of a sharded layer, those of the unsharded one, and the compiled program."""
    x, w, want = unsharded_gradients(lead)
    mesh = op_checks.make_mesh(mode)
    placed = [jax.device_put(z, NamedSharding(mesh, s)) for z, s in ((x, x_spec), (w, w_spec))]
    function = layer
    if mode == "shard_map":
        function = jax.shard_map(layer, mesh=mesh, in_specs=(x_spec, w_spec), out_specs=y_spec)
    elif mode == "explicit":
        function = functools.partial(layer, out_sharding=y_spec)
    options = {} if mode != "auto" else {"out_shardings": tuple(z.sharding for z in placed)}
    with jax.set_mesh(mesh) if mode == "explicit" else contextlib.nullcontext():
        program = jax.jit(of_sine(function), **options).lower(*placed).compile()
        got = program(*placed)
    for one, other, where in zip(got, want, placed, strict=True):
        assert one.sharding.is_equivalent_to(where.sharding, one.ndim)
        # inside shard_map each device quantises along its own tokens
        assert oracle.calc_diff(one, other) < (2 * TOLERANCE if mode == "shard_map" else 1e-4)
    return program.as_text()


def moves_operands(hlo: str) -> bool:
    """Whether anything but sums and grids of scales travels between devices."""
    moved = re.findall(
        r"= \(?\w+\[([\d,]+)\]\S* (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", hlo
    )
    return any(math.prod(map(int, shape.split(","))) > 256 for shape in moved)


@pytest.mark.parametrize("w_spec", [P("y"), P(None, "y")], ids=str)
def test_auto_axes_move_no_operands(w_spec):
    x, w = args(16)(0)
    mesh = op_checks.make_mesh("auto")
    x_spec, y_spec = (P("x"), P("x", "y")) if w_spec == P("y") else (P("x", "y"), P("x"))
    placed = [jax.device_put(z, NamedSharding(mesh, s)) for z, s in ((x, x_spec), (w, w_spec))]
    program = jax.jit(layer, out_shardings=NamedSharding(mesh, y_spec)).lower(*placed).compile()
    op_checks.assert_same(program(*placed), layer(x, w), 1e-4)
    assert not moves_operands(program.as_text())


@pytest.mark.parametrize("mode", ["auto", "explicit", "shard_map"])
def test_gradients_data_parallel(mode):
    """Tokens cut: the weight's gradient is summed; the activations' one needs nothing."""
    hlo = sharded_gradients(mode, P("y"), P(), P("y", None))
    assert not moves_operands(hlo)
    assert "all-reduce" in hlo


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_gradients_column_parallel(mode):
    hlo = sharded_gradients(mode, P("x"), P("y"), P("x", "y"))
    assert not moves_operands(hlo)


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_gradients_row_parallel(mode):
    hlo = sharded_gradients(mode, P("x", "y"), P(None, "y"), P("x", None))
    assert not moves_operands(hlo)


@pytest.mark.parametrize("mode", ["explicit", "shard_map"])
def test_gradients_with_batch_and_sequence_cut(mode):
    hlo = sharded_gradients(mode, P("x", "y"), P(), P("x", "y", None), lead=(4, 16))
    assert not moves_operands(hlo)


def test_replicated_weight_inside_shard_map_gets_the_summed_gradient():
    """Differentiated inside: each device has the whole sum of a weight it shares."""
    x, w = normal(0, 64, 256, dtype=F32), normal(1, 128, 256, dtype=F32)
    mesh = op_checks.make_mesh("auto", (8,), ("x",))
    inside = lambda x, w: jax.grad(lambda w: fp8_linear(x, w, out_dtype=F32).sum())(w)  # noqa: E731
    got = jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=(P("x"), P()), out_specs=P()))(x, w)
    assert oracle.calc_diff(got, exact(x, w, jnp.ones((64, 128)))[2]) < TOLERANCE


def test_train_step_in_scan_goes_down():
    """A few steps of a two-layer net on data with a known answer."""
    x = normal(0, 128, 256)
    target = jnp.tanh(x.astype(F32) @ normal(9, 256, 128, dtype=F32) / 16)
    params = {"up": normal(1, 256, 256, dtype=F32) / 16, "down": normal(2, 128, 256, dtype=F32) / 16}

    def loss(params: Any) -> jax.Array:
        hidden = jax.nn.silu(fp8_linear(x, params["up"]))
        return jnp.mean((fp8_linear(hidden, params["down"]).astype(F32) - target) ** 2)

    def step(params: Any, _: None) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), value

    _, losses = jax.jit(lambda p: jax.lax.scan(step, p, length=20))(params)
    assert losses[-1] < 0.7 * losses[0]
