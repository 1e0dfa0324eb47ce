"""The inner size of experts cut over a mesh axis: as on one device, in every layout, and what travels."""

from __future__ import annotations

import functools
import re
from collections import Counter
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
    expert_parallel_moe,
    moe_layer,
    moe_mlp,
    prepare_weights,
)
from tests.shared.expert_forms import MODELS, arrays, biases, bound, float64
from tests.shared.moe_oracle import pull, relative, wide

pytestmark = pytest.mark.any_version

SIZES = (24, 128, 256, 4, 2)
AXES = ("data", "expert", "tensor")
WHOLE, CUT = ("data", "expert"), AXES  # tokens: equal on the devices of the tensor axis, or cut over it
both = pytest.mark.parametrize("recipe", ["fp8", "bf16"])
COLLECTIVE = re.compile(r" (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\(")


def mesh_of(data: int, expert: int, tensor: int, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    sizes, devices = (data, expert, tensor), jax.devices()[: data * expert * tensor]
    return jax.make_mesh(sizes, AXES, axis_types=(kind,) * 3, devices=devices)


def cut(form: ExpertForm, mesh: jax.sharding.Mesh, recipe: str, tokens: Any, **options: Any) -> Any:
    """moe_layer as a function of x, weights and what may be cut."""

    def run(x: Any, weights: Any, w13: Any, w2: Any, *more: Any) -> jax.Array:
        named = dict(zip(("b13", "b2"), more, strict=False)) | options
        given = {"mesh": mesh, "tensor_axis": "tensor", "token_axes": tokens, "form": form, "recipe": recipe}
        return moe_layer(x, IDS, weights, w13, w2, **given, **named)[0]

    return run


IDS = arrays(ExpertForm(), SIZES)[1]


@functools.cache
def case(model: str, bias: bool = False) -> tuple[list[Any], Any, list[np.ndarray]]:
    form = MODELS[model]
    x, ids, weights, w13, w2, dy = arrays(form, SIZES)
    more = biases(form, w13, w2) if bias else ()
    return [x, weights, w13, w2, *more], dy, float64(form, x, ids, weights, w13, w2, dy, *more)


def worst(got: Any, want: Any) -> float:
    return max(relative(one, other) for one, other in zip(got, want, strict=True))


CASES = [
    ("qwen3", False, (1, 4, 2), WHOLE, "fp8"),
    ("gpt-oss", True, (2, 2, 2), WHOLE, "bf16"),
    ("nemotron3", True, (2, 2, 2), CUT, "fp8"),
    ("gemma4", True, (1, 4, 2), CUT, "bf16"),
    ("llama4", False, (2, 1, 2), CUT, "bf16"),
]


@pytest.mark.parametrize(("model", "bias", "sizes", "tokens", "recipe"), CASES)
def test_forward_and_gradients(model, bias, sizes, tokens, recipe):
    args, dy, want = case(model, bias)
    got = pull(cut(MODELS[model], mesh_of(*sizes), recipe, tokens), *args, by=dy)
    assert worst(got, want) < bound(recipe, MODELS[model])
    assert [one.shape for one in got] == [one.shape for one in want]


def apart(w13: jax.Array) -> jax.Array:
    return w13.reshape(4, 2, 256, 128)


GIVEN: dict[str, Any] = {
    "joined": (lambda w13: w13, P("expert")),
    "apart": (apart, P("expert", None, "tensor")),
    "two arrays": (lambda w13: tuple(apart(w13)[:, half] for half in (0, 1)), P("expert", "tensor")),
}


KINDS = {"joined": AxisType.Auto, "apart": AxisType.Auto, "two arrays": AxisType.Explicit}


@pytest.mark.parametrize(("given", "kind"), KINDS.items())
def test_gate_and_up_as_they_are_stored(given, kind):
    """Equal bits however they are, gradients cut as they are, and no weight moves."""
    (x, weights, w13, w2), dy, _ = case("qwen3")
    want = pull(cut(ExpertForm(), mesh_of(1, 4, 2), "bf16", WHOLE), x, weights, w13, w2, by=dy)
    form, spec = GIVEN[given]
    mesh = mesh_of(1, 4, 2, kind)
    put = lambda z, *spec: jax.device_put(z, NamedSharding(mesh, P(*spec)))  # noqa: E731
    tokens = [put(z, ("data", "expert")) for z in (x, weights)]
    args = *tokens, put(form(w13), *spec), put(w2, "expert", None, "tensor")
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(pull, cut(ExpertForm(), mesh, "bf16", WHOLE), by=dy))
        got, text = run(*args), run.lower(*args).compile().as_text()
    for one, other in zip(got, (*want[:3], form(want[3]), want[4]), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(wide(a), wide(b)), one, other)
    if given != "joined":
        assert Counter(COLLECTIVE.findall(text)).keys() == {"all-to-all", "all-reduce"}
        for one, arg in zip(jax.tree.leaves(got[3:]), jax.tree.leaves(args[2:]), strict=True):
            assert one.sharding.is_equivalent_to(arg.sharding, one.ndim)


def collectives(compiled: Any) -> Counter[str]:
    """How many arrays each kind of collective moves; all_to_all's pieces count once."""
    found = [line for line in compiled.as_text().splitlines() if COLLECTIVE.search(line)]
    kinds: Counter[str] = Counter()
    for line in found:
        kind = COLLECTIVE.findall(line)[0]
        kinds[kind] += (
            1 if kind == "all-to-all" else len(re.findall(r"\w+\[[\d,]*\]", line.split(f" {kind}")[0]))
        )
    return kinds


@pytest.mark.parametrize("tokens", [WHOLE, CUT])
def test_what_travels_over_the_tensor_axis(tokens):
    """Beside what experts on devices need: forward one sum of y, backward those of dx and dweights."""
    mesh = jax.make_mesh((4, 2), AXES[1:], axis_types=(AxisType.Auto,) * 2)
    (x, weights, w13, w2), dy, _ = case("qwen3")
    own = P(tokens[1:])
    specs = own, own, P("expert", None, "tensor"), P("expert", None, "tensor")
    places = [NamedSharding(mesh, spec) for spec in specs]
    args = [jax.device_put(a, to) for a, to in zip((x, weights, apart(w13), w2), places, strict=True)]
    layer = cut(ExpertForm(), mesh, "fp8", tokens[1:])
    step = functools.partial(pull, layer, by=dy)
    forward = collectives(jax.jit(layer, out_shardings=places[0]).lower(*args).compile())
    both = collectives(jax.jit(step, out_shardings=(places[0], *places)).lower(*args).compile())
    exchanges = {"all-to-all": 4}  # ids, bytes, scales with weights, and y back
    more = {"all-to-all": 8}  # and bytes and scales of dy, dx and dweights back
    if tokens is WHOLE:
        assert (forward, both) == (exchanges | {"all-reduce": 1}, more | {"all-reduce": 3})
    else:  # x, ids with weights, dy; y, dx, dweights
        assert forward == exchanges | {"all-gather": 2, "reduce-scatter": 1}
        assert both == more | {"all-gather": 3, "reduce-scatter": 3}


@pytest.mark.parametrize("form", [ExpertForm(), ExpertForm("gelu", "kn")], ids=["nk", "kn"])
def test_prepared_weights(form):
    """Copies are cut as their masters: equal bits, and equal gradients."""
    x, _, weights, w13, w2, dy = arrays(form, SIZES)
    run = cut(form, mesh_of(1, 2, 2), "fp8", WHOLE)
    prepared = lambda x, *w: run(x, weights, *prepare_weights(*w, form=form))  # noqa: E731
    masters = lambda x, *w: run(x, weights, *w)  # noqa: E731
    if form.weight_layout == "nk":
        got, want = ([jax.jit(layer)(x, w13, w2)] for layer in (prepared, masters))
    else:
        got, want = (pull(layer, x, w13, w2, by=dy) for layer in (prepared, masters))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(wide(one), wide(other))


@functools.cache
def of_masters() -> jax.Array:
    (x, weights, w13, w2), _, _ = case("qwen3")
    return jax.jit(cut(ExpertForm(), mesh_of(1, 4, 2), "fp8", CUT))(x, weights, w13, w2)


@pytest.mark.parametrize("given", GIVEN)
def test_frozen_weights(given):
    """Values and scales as they are, in the mesh's layout: the bits of masters."""
    (x, weights, w13, w2), _, _ = case("qwen3")
    form, spec = GIVEN[given]
    mesh = mesh_of(1, 4, 2)
    run = cut(ExpertForm(), mesh, "fp8", CUT)

    def frozen(w: jax.Array, spec: P) -> Any:
        q = quantize(w, (128, 128))
        return jax.device_put(q, q.shardings(NamedSharding(mesh, spec)))

    first = jax.tree.map(lambda w: frozen(w, spec), form(w13))
    got = jax.jit(run)(x, weights, first, frozen(w2, P("expert", None, "tensor")))
    np.testing.assert_array_equal(wide(got), wide(of_masters()))


def shared_experts(form: ExpertForm) -> SharedExperts:
    """Two, with all parts."""
    _, _, _, w13, w2, _ = arrays(form, (1, 128, 256, 2, 1))
    b13, b2 = biases(form, w13, w2)
    return SharedExperts(w13, w2, b13, b2, jnp.linspace(-1, 1, 128))


def test_shared_experts_are_cut_too():
    """One sum for both; gradients of all their parts."""
    form = MODELS["gpt-oss"]
    (x, weights, w13, w2), dy, _ = case("gpt-oss")

    def one(x: Any, shared: Any) -> jax.Array:
        return moe_mlp(x, IDS, weights, w13, w2, shared=shared, form=form, recipe="bf16")

    def many(x: Any, shared: Any) -> jax.Array:
        return cut(form, mesh_of(1, 2, 2), "bf16", CUT, shared=shared)(x, weights, w13, w2)

    got, want = (jax.tree.leaves(pull(run, x, shared_experts(form), by=dy)) for run in (many, one))
    assert worst(got, want) < 0.02


@pytest.mark.parametrize("tokens", [WHOLE, CUT])
def test_dropped_copies_are_counted_once(tokens):
    (x, weights, w13, w2), _, _ = case("qwen3")
    counts = []
    for options in ({"tensor_axis": "tensor", "token_axes": tokens}, {"token_axes": WHOLE}):
        mesh = mesh_of(1, 4, 2)
        layer = functools.partial(moe_layer, mesh=mesh, recipe="bf16", capacity_factor=0.5, **options)
        counts.append(int(jax.jit(layer)(x, IDS, weights, w13, w2)[1]))
    assert counts[0] == counts[1] > 0


def inside(form: ExpertForm, mesh: jax.sharding.Mesh, tokens: P, w13: Any, **options: Any) -> Any:
    """expert_parallel_moe in a shard_map, of w13 that is cut by this spec."""

    def local(*args: Any) -> jax.Array:
        given = {"axis": "expert", "tensor_axis": "tensor", "recipe": "bf16", "form": form}
        return expert_parallel_moe(*args, **given, **options)[0]

    w2 = P("expert", None, "tensor")
    return functools.partial(
        jax.shard_map, local, mesh=mesh, in_specs=(*(tokens,) * 3, w13, w2), out_specs=tokens
    )


@pytest.mark.parametrize("method", ["all_to_all", "ragged"])
def test_inside_shard_map(method):
    """w13 [e, 2, i, h] with i cut: each device has its features of gate and of up."""
    (x, weights, w13, w2), dy, want = case("qwen3")
    spec = P("expert", None, "tensor")
    for tokens in (P(WHOLE), P(CUT)):
        run = inside(ExpertForm(), mesh_of(1, 4, 2), tokens, spec, method=method)()
        got = pull(lambda x, p, a, b, run=run: run(x, IDS, p, apart(a), b), x, weights, w13, w2, by=dy)
        assert worst(got, want) < bound("bf16", ExpertForm())


X, _, WEIGHTS, W13, W2, _ = arrays(ExpertForm(), SIZES)


def called(w13: Any = W13, w2: Any = W2, mesh: Any = None, **options: Any) -> Any:
    given = {"mesh": mesh or mesh_of(1, 2, 4), "tensor_axis": "tensor"} | options
    return moe_layer(X, IDS, WEIGHTS, w13, w2, **given)


def on_explicit_axes() -> Any:
    mesh = mesh_of(1, 4, 2, AxisType.Explicit)
    with jax.set_mesh(mesh):
        return called(jax.device_put(W13, NamedSharding(mesh, P("expert", "tensor"))), mesh=mesh)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (called, r"inner size of 256 over 4 devices .* is 64 on each.*size of 512.*or recipe='bf16'"),
        (
            lambda: called(W13[:, : 2 * 130], W2[:, :, :130], recipe="bf16"),
            r"inner size of 130 over 4 devices of tensor_axis, need a multiple. Pad .* size of 132",
        ),
        (lambda: called(tensor_axis="model"), r"tensor_axis is \('model',\).*need other axes of the mesh"),
        (lambda: called(tensor_axis="expert"), r"tensor_axis is \('expert',\).*need other axes of the mesh"),
        (
            lambda: called(shared=SharedExperts(W13[0, :256], W2[0, :, :128]), mesh=mesh_of(1, 4, 2)),
            r"inner size of 128 over 2 devices of tensor_axis is 64 on each",
        ),
        (on_explicit_axes, r"w13 is \[4, 512, 128\], gate and up joined, and .* 1 is cut.*\[e, 2, i, h\]"),
        (
            lambda: inside(ExpertForm(), mesh_of(1, 4, 2), P(WHOLE), P("expert", None, "tensor"))(
                check_vma=False
            )(X, IDS, WEIGHTS, apart(W13), W2),
            r"check_vma=False.*need check_vma=True, the default",
        ),
        (
            lambda: moe_mlp(X, IDS, WEIGHTS, W13.reshape(4, 256, 2, 128), W2),
            r"w13 is \[4, 256, 2, 128\] .*need 3 dimensions, or .*\[e, 2, i, h\]",
        ),
    ],
    ids=range(8),
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@both
def test_moe_mlp_of_cut_weights_on_auto_axes_is_right(recipe):
    mesh = mesh_of(1, 1, 2)
    layer = jax.jit(functools.partial(moe_mlp, recipe=recipe))
    put = lambda w, *spec: jax.device_put(w, NamedSharding(mesh, P(*spec)))  # noqa: E731
    whole = [put(z) for z in (X, IDS, WEIGHTS)]
    got = layer(*whole, put(W13, None, "tensor"), put(W2, None, None, "tensor"))
    assert relative(got, layer(X, IDS, WEIGHTS, W13, W2)) < 0.005


def test_advice_for_inner_sizes_that_do_not_fit():
    """Padded by zeros, as the messages say."""
    w13 = jnp.pad(W13.reshape(4, 2, 256, 128), ((0, 0), (0, 0), (0, 256), (0, 0)))
    w2 = jnp.pad(W2, ((0, 0), (0, 0), (0, 256)))
    y, _ = jax.jit(called)(w13, w2)
    assert relative(y, jax.jit(moe_mlp)(X, IDS, WEIGHTS, W13, W2)) < 0.01
