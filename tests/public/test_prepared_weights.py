"""Weights quantised once: the same numbers as with masters under every transformation, and nothing twice."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm import fp8_linear, grouped_linear, prepare_weight
from jax_deepgemm.moe import expert_mlp, moe_layer, moe_mlp, moe_mlp_decode, prepare_weights, route
from tests.shared.arrays import normal

pytestmark = pytest.mark.any_version

BF16, F32 = jnp.bfloat16, jnp.float32
STEPS, M, N, K, G, I = 3, 40, 256, 384, 4, 128
SIZES = jnp.array([7, 0, 20, 9], jnp.int32)
ROW_WEIGHTS = 1 + normal(5, M, dtype=F32) / 8
IDS, WEIGHTS = route(normal(6, M, G, dtype=F32), 2)


def linear(x: Any, *w: Any) -> Any:
    return fp8_linear(fp8_linear(x, w[0]), w[1])


def grouped(x: Any, *w: Any) -> Any:
    return grouped_linear(grouped_linear(x, w[0], SIZES), w[1], SIZES)


def experts(x: Any, *w: Any) -> Any:
    return expert_mlp(x, *w, SIZES, ROW_WEIGHTS)


def mixture(x: Any, *w: Any) -> Any:
    return moe_mlp(x, IDS, WEIGHTS, *w)


def over_devices(x: Any, *w: Any) -> Any:
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    return moe_layer(x, IDS, WEIGHTS, *w, mesh=mesh)[0]


def weights(*lead: int) -> tuple[jax.Array, ...]:
    return normal(1, *lead, N, K, dtype=F32) / 16, normal(2, *lead, K, N, dtype=BF16) / 16


def expert_weights() -> tuple[jax.Array, ...]:
    return normal(3, G, 2 * I, K, dtype=BF16) / 16, normal(4, G, K, I, dtype=F32) / 16


LAYERS: dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...]]] = {
    "fp8_linear": (linear, weights()),
    "grouped_linear": (grouped, weights(G)),
    "expert_mlp": (experts, expert_weights()),
    "moe_mlp": (mixture, expert_weights()),
}
BATCHES = normal(0, STEPS, M, K)
each_layer = pytest.mark.parametrize("name", list(LAYERS))


def prepared(masters: Any) -> Any:
    return jax.tree.map(prepare_weight, masters)


def with_masters(copies: Any, masters: Any) -> Any:
    return tuple(one.with_master(w) for one, w in zip(copies, masters, strict=True))


def loss_of(layer: Callable[..., Any], w: Any, x: Any) -> Any:
    y = layer(x, *w).astype(F32)
    return jnp.sum(jnp.tanh(y) * jnp.arange(y.shape[-1], dtype=F32))


def over_microbatches(layer: Callable[..., Any], w: Any, batches: Any) -> Any:
    def body(total: Any, x: Any) -> Any:
        return total + loss_of(layer, w, x), None

    return jax.lax.scan(body, jnp.zeros((), F32), batches)[0]


@functools.cache
def masters_only(name: str) -> Any:
    """Gradients of masters, a microbatch after the other, without a program around them."""
    layer, masters = LAYERS[name]

    def loss(w: Any, batches: Any) -> Any:
        return sum(loss_of(layer, w, x) for x in batches)

    return jax.value_and_grad(loss, (0, 1))(masters, BATCHES)


def masters_over_devices() -> Any:
    """In shard_map, where a device sees that it has whole rows."""
    loss = lambda w, x: over_microbatches(over_devices, w, x)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(LAYERS["moe_mlp"][1], BATCHES)


def inside(layer: Any, masters: Any, batches: Any) -> Any:
    """Prepared in the differentiated function."""
    loss = lambda w, x: over_microbatches(layer, prepared(w), x)  # noqa: E731
    return jax.value_and_grad(loss, (0, 1))(masters, batches)


def outside(layer: Any, masters: Any, batches: Any) -> Any:
    """Prepared in front of it."""
    copies = prepared(masters)
    loss = lambda w, x: over_microbatches(layer, with_masters(copies, w), x)  # noqa: E731
    return jax.value_and_grad(loss, (0, 1))(masters, batches)


def whole(layer: Any, masters: Any, batches: Any) -> Any:
    """Differentiated with respect to all of a PreparedWeight."""
    loss = lambda w, x: over_microbatches(layer, w, x)  # noqa: E731
    value, (dw, dx) = jax.value_and_grad(loss, (0, 1), allow_int=True)(prepared(masters), batches)
    assert {leaf.dtype for one in dw for leaf in jax.tree.leaves(one.copies)} == {jax.dtypes.float0}
    return value, (tuple(one.master for one in dw), dx)


def equal(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@each_layer
def test_bits_of_masters(name: str) -> None:
    layer, masters = LAYERS[name]
    x = BATCHES[0]
    y, pull = jax.vjp(layer, x, *masters)
    got, pull_prepared = jax.vjp(lambda x, *w: layer(x, *map(prepare_weight, w)), x, *masters)
    equal((got, pull_prepared(y)), (y, pull(y)))
    equal(layer(x, *prepared(masters)), layer(x, *masters))


@pytest.mark.parametrize(
    ("layer", "name", "ways"),
    [
        (linear, "fp8_linear", (inside, outside, whole)),
        (jax.checkpoint(mixture), "moe_mlp", (outside,)),
        (over_devices, "moe_mlp", (inside,)),
    ],
    ids=["fp8_linear", "moe_mlp of jax.checkpoint", "moe_layer"],
)
def test_ways_to_write_it(layer: Any, name: str, ways: Any) -> None:
    """Compiled for a CPU, whose products sum in an order that XLA chooses: not equal bits."""
    want = masters_over_devices() if layer is over_devices else masters_only(name)
    for way in ways:
        near(jax.jit(functools.partial(way, layer))(LAYERS[name][1], BATCHES), want)
    assert np.isfinite(want[0])


def near(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(z, np.float64) for z in (one, other))
        assert np.linalg.norm(one - other) < 1e-2 * np.linalg.norm(other)


@each_layer
@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
@pytest.mark.parametrize("way", [inside, outside], ids=lambda way: way.__name__)
def test_quantised_once_and_never_copied(name: str, remat: bool, way: Any) -> None:
    """One op for each weight; no loop stacks its copies; no array of a weight's size but the gradients."""
    layer, masters = LAYERS[name]
    layer = jax.checkpoint(layer) if remat else layer
    text = str(jax.make_jaxpr(functools.partial(way, layer))(masters, BATCHES))
    assert len(re.findall(r"= quantize_weight_\w+\[", text)) == len(masters)
    assert not re.findall(r"= quantize_float8\w+128x128\w*\[", text)
    for w in masters:
        for shape in (w.shape, w.mT.shape):
            dims = ",".join(map(str, shape))
            assert f"u8[{dims}]" in text
            assert not re.search(rf"(u8|f8_\w+)\[{STEPS},{dims}\]", text)
            assert not re.search(rf":(u8|f8_\w+)\[{dims}\] = (broadcast_in_dim|zeros\w*|add_any|copy)", text)


@each_layer
def test_what_waits_is_the_array_itself(name: str) -> None:
    layer, masters = LAYERS[name]
    w = prepared(masters)
    kept = jax.vjp(lambda x: layer(x, *w), BATCHES[0])[1]
    for one in w:
        assert any(leaf is one.copies.transposed.values for leaf in jax.tree.leaves(kept))


def test_stacked_layers() -> None:
    """A scan over layers, each with its slice; and vmap over models."""
    stack = normal(1, 3, K, K, dtype=F32) / 16

    def run(w: Any, x: Any) -> Any:
        return jnp.sum(jax.lax.scan(lambda x, w: (fp8_linear(x, w), None), x, w)[0].astype(F32))

    x = BATCHES[0]
    want = jax.jit(jax.grad(run))(stack, x)
    equal(jax.jit(jax.grad(lambda w: run(prepare_weight(w), x)))(stack), want)
    each = jax.vmap(lambda w, x: fp8_linear(x, w))
    equal(each(prepare_weight(stack), BATCHES), each(stack, BATCHES))


MESHES = [
    ("fp8_linear", P("y"), "explicit"),
    ("fp8_linear", P(None, "y"), "auto"),
    ("grouped_linear", P(None, "y"), "auto"),
    ("grouped_linear", P(None, "y"), "explicit"),
]


ONE = {"fp8_linear": fp8_linear, "grouped_linear": functools.partial(grouped_linear, group_sizes=SIZES)}


def gradients(name: str, prepare: Any, w: Any, x: Any, **options: Any) -> Any:
    def loss(w: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(ONE[name](x, prepare(w), **options).astype(F32)))

    return jax.grad(loss, (0, 1))(w, x)


@functools.cache
def gradients_of_master(name: str) -> Any:
    return gradients(name, lambda w: w, LAYERS[name][1][0], BATCHES[0])


@pytest.mark.parametrize(("name", "spec", "mode"), MESHES, ids=str)
def test_meshes(name: str, spec: P, mode: str) -> None:
    """Prepared and used on a mesh, cuts inside blocks of 128 among them, as the master on one device."""
    explicit = mode == "explicit"
    mesh = jax.make_mesh(
        (2, 4), ("x", "y"), axis_types=(AxisType.Explicit if explicit else AxisType.Auto,) * 2
    )
    options = {"out_sharding": P()} if explicit else {}
    run = functools.partial(gradients, name, prepare_weight, **options)
    w, x = LAYERS[name][1][0], BATCHES[0]
    with jax.set_mesh(mesh):
        got = jax.jit(run)(jax.device_put(w, NamedSharding(mesh, spec)), jax.device_put(x, P()))
    near(got, gradients_of_master(name))


@pytest.mark.parametrize("name", ["fp8_linear", "grouped_linear"])
def test_shard_map(name: str) -> None:
    """The weight is whole on each device, and so are tokens in groups."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    cut = P("x") if name == "fp8_linear" else P()
    operands = LAYERS[name][1][0], BATCHES[0]

    def run(prepare: Any) -> Any:
        body = functools.partial(gradients, name, prepare)
        return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(P(), cut), out_specs=(P(), cut)))(*operands)

    near(run(prepare_weight), run(lambda w: w))


def test_placed_as_the_master_is() -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    w = prepare_weight(normal(1, 512, 384, dtype=F32))
    placed = jax.device_put(w, w.shardings(NamedSharding(mesh, P("y", "x"))))
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(placed)]
    assert specs == [P("y", "x"), P("y", "x"), P("y", None), P("x", "y"), P(None, "y")]
    near(fp8_linear(BATCHES[0], placed), fp8_linear(BATCHES[0], w))


def test_what_it_holds() -> None:
    master = normal(1, 2, 200, 384, dtype=BF16)
    w = prepare_weight(master)
    assert w.master is master
    equal(w.quantized, jdg.quantize(master, (128, 128)))
    equal(w.transposed, jdg.quantize(master.mT, (128, 128)))
    assert (w.shape, w.ndim, w.dtype) == ((2, 200, 384), 3, BF16)
    assert repr(w) == "PreparedWeight(bfloat16[2,200,384], float8_e4m3fn copies)"
    assert "PreparedWeight(" in repr(jax.tree.map(lambda _: None, w))
    powers = prepare_weight(master, scale_format="ue8m0")
    equal(powers.quantized, jdg.quantize(master, (128, 128), scale_format="ue8m0"))


def test_another_dtype_of_gradients() -> None:
    """A bfloat16 weight whose gradient is float32: what `with_master` is given decides."""
    master, x = normal(1, N, K), BATCHES[0]
    w = prepare_weight(master)
    grad = jax.grad(lambda m: jnp.sum(fp8_linear(x, w.with_master(m)).astype(F32)))
    wide = grad(jnp.zeros((N, K), F32))
    assert wide.dtype == F32
    equal(grad(master), wide.astype(BF16))


def test_decoding_reads_the_copies() -> None:
    masters, x = LAYERS["moe_mlp"][1], BATCHES[0]
    equal(
        moe_mlp_decode(x, IDS, WEIGHTS, *prepare_weights(*masters)), moe_mlp_decode(x, IDS, WEIGHTS, *masters)
    )


W = prepare_weight(jnp.ones((G, N, K), BF16))
ERRORS: list[tuple[Callable[[], Any], type[Exception], str, Callable[[], Any]]] = [
    (
        lambda: prepare_weight(jdg.quantize(W.master)),
        TypeError,
        "go to the layers as they are",
        lambda: W.quantized,
    ),
    (lambda: prepare_weight(W), TypeError, "PreparedWeight, need a bfloat16 or float32 array", lambda: W),
    (lambda: prepare_weight(jnp.ones((2, 2), jnp.float16)), TypeError, "is float16, need", lambda: W),
    (lambda: prepare_weight(jnp.ones(4)), ValueError, "need rank >= 2", lambda: W),
    (
        lambda: W.with_master(W.master[0]),
        ValueError,
        r"master is \[256, 384\].* need the same shape",
        lambda: prepare_weight(W.master[0]),
    ),
    (lambda: W.with_master(np.ones((G, N, K))), TypeError, "master is float64", lambda: W),
    (
        lambda: grouped(BATCHES[0], jdg.PreparedWeight(W.master.mT, W.copies), W),
        ValueError,
        "its FP8 copies are .* prepare_weight",
        lambda: prepare_weight(W.master.mT),
    ),
    (
        lambda: grouped_linear(BATCHES[0], W, SIZES, recipe="bf16"),
        ValueError,
        "pass the master: w.master",
        lambda: grouped_linear(BATCHES[0], W.master, SIZES, recipe="bf16"),
    ),
    (
        lambda: expert_mlp(BATCHES[0], *prepare_weights(*expert_weights()), SIZES, recipe="bf16"),
        ValueError,
        "pass the master: w13.master",
        lambda: expert_mlp(BATCHES[0], *expert_weights(), SIZES, recipe="bf16"),
    ),
    (lambda: fp8_linear(BATCHES[0], W), ValueError, "w is .4, 256, 384.", lambda: W),
    (lambda: fp8_linear(W, W), TypeError, "the layer quantises it", lambda: W),
    (lambda: grouped_linear(W, W, SIZES), TypeError, "the layer quantises it", lambda: W),
]


@pytest.mark.parametrize("case", ERRORS, ids=[case[2] for case in ERRORS])
def test_errors(case: Any) -> None:
    call, error, message, way_out = case
    with pytest.raises(error, match=message):
        call()
    way_out()
