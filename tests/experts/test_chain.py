"""The chain of a layer of experts: its values on a CPU, what it launches, and where it is taken."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm.core.chain import Part, chained
from jax_deepgemm.core.chip import H200
from jax_deepgemm.core.launch import Launch, LaunchPlan, Memset, Operand, Result, Scratch, TensorMap, decode
from jax_deepgemm.core.plan import encode
from jax_deepgemm.moe import layer, moe_mlp
from jax_deepgemm.ops.experts.api import experts_swiglu, fits
from jax_deepgemm.ops.experts.family import FAMILY, ExpertsProblem
from jax_deepgemm.ops.experts.limits import MOST_COPIES
from jax_deepgemm.ops.experts.op import LAYER
from jax_deepgemm.ops.experts.sm90 import problems
from jax_deepgemm.ops.grouped.family import FAMILY as GROUPED
from jax_deepgemm.quantization import QuantizedArray
from tests.shared.moe_oracle import normal, random_ids

pytestmark = pytest.mark.any_version

BF16, F32 = jnp.bfloat16, jnp.float32


def operands(
    tokens: int = 5, top_k: int = 3, experts: int = 4, inner: int = 128, dtype: Any = BF16
) -> tuple[Any, ...]:
    x, weights = normal(0, tokens, 512, dtype=dtype), jax.nn.softmax(normal(1, tokens, top_k, dtype=F32))
    ids = random_ids(2, tokens, top_k, experts, dropped=0.2)
    w13 = jdg.quantize(normal(3, experts, 2 * inner, 512), (128, 128))
    w2 = jdg.quantize(normal(4, experts, 512, inner), (128, 128))
    return x, ids, weights, w13, w2


@pytest.fixture(autouse=True)
def _ops_in_a_row(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The layer is not a chain unless a test says so."""
    monkeypatch.setattr(layer, "MOST_CHAINED", 0)
    yield
    jax.clear_caches()


@pytest.fixture
def in_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "MOST_CHAINED", MOST_COPIES)
    jax.clear_caches()  # a layer's trace is kept


def assert_equal(one: Any, other: Any) -> None:
    np.testing.assert_array_equal(np.asarray(one.astype(F32)), np.asarray(other.astype(F32)))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=("bf16", "f32"))
@pytest.mark.parametrize("inner", [128, 384])
def test_values_are_those_of_the_ops_in_a_row(inner: int, dtype: Any) -> None:
    given = operands(inner=inner, dtype=dtype)
    assert fits(*given[:2], *given[3:])
    got = jax.jit(experts_swiglu)(*given)
    assert got.dtype == dtype
    assert_equal(got, jax.jit(moe_mlp)(*given))


def test_the_layer_takes_it(in_a_chain: None) -> None:
    x, *given = operands()
    used = lambda *given: "experts_fp8" in str(jax.make_jaxpr(moe_mlp)(*given))  # noqa: E731
    assert used(x, *given)
    narrow = (jdg.quantize(normal(5, *shape), (128, 128)) for shape in ((4, 256, 384), (4, 384, 128)))
    assert not used(x[:, :384], *given[:2], *narrow)
    grad = jax.grad(lambda x: moe_mlp(x, *given).astype(F32).sum())
    assert "experts_fp8[" not in str(jax.make_jaxpr(grad)(x))
    assert grad(x).shape == x.shape


def test_the_layer_takes_it_for_few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    jax.clear_caches()
    x, ids, weights, *frozen = operands()
    used = lambda n: "experts_fp8" in str(jax.make_jaxpr(moe_mlp)(x[:n], ids[:n], weights[:n], *frozen))  # noqa: E731
    assert layer.MOST_CHAINED == 16
    assert used(5)
    x, ids, weights, *frozen = operands(tokens=6)
    assert not used(6)


def test_vmap_and_cut_tokens() -> None:
    x, ids, weights, *frozen = operands(tokens=8)
    run = lambda x, ids, weights: experts_swiglu(x, ids, weights, *frozen)  # noqa: E731
    want = run(x, ids, weights)
    stacked = jax.vmap(run)(*(z.reshape(2, 4, *z.shape[1:]) for z in (x, ids, weights)))
    assert_equal(stacked.reshape(want.shape), want)
    mesh = jax.make_mesh((8,), ("t",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.sharding.NamedSharding(mesh, jax.P("t"))
    got = jax.jit(run, out_shardings=cut)(*(jax.device_put(z, cut) for z in (x, ids, weights)))
    assert_equal(got, want)


def test_the_layer_on_explicit_axes_and_under_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    x, ids, weights, *frozen = operands(tokens=8)
    want = moe_mlp(x, ids, weights, *frozen)
    monkeypatch.setattr(layer, "MOST_CHAINED", MOST_COPIES)
    jax.clear_caches()
    mesh = jax.make_mesh((8,), ("t",), axis_types=(jax.sharding.AxisType.Explicit,))
    placed = [jax.device_put(z, jax.sharding.NamedSharding(mesh, jax.P("t"))) for z in (x, ids, weights)]
    whole = jax.device_put(frozen, jax.sharding.NamedSharding(mesh, jax.P()))
    step = jax.jit(moe_mlp)
    assert "experts_fp8" in str(jax.make_jaxpr(step)(*placed, *whole))
    assert_equal(step(*placed, *whole), want)
    run = jax.vmap(lambda x, ids, weights: moe_mlp(x, ids, weights, *frozen))
    assert_equal(run(*(z.reshape(2, 4, *z.shape[1:]) for z in (x, ids, weights))).reshape(want.shape), want)


def test_no_gradient() -> None:
    x, *given = operands()
    with pytest.raises(NotImplementedError, match="moe_mlp"):
        jax.grad(lambda x: experts_swiglu(x, *given).astype(F32).sum())(x)


PROBLEM = ExpertsProblem(16, 8, 7168, 768, 32, 4)


@functools.cache
def plan_of(p: ExpertsProblem) -> LaunchPlan:
    types = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((p.tokens, p.hidden), BF16),
            ((p.tokens, p.slots), jnp.int32),
            ((p.tokens, p.slots), F32),
            ((p.experts, 2 * p.inner, p.hidden), jnp.float8_e4m3fn),
            ((p.experts, 2 * p.inner // 128, p.hidden // 128), F32),
            ((p.experts, p.hidden, p.inner), jnp.float8_e4m3fn),
            ((p.experts, p.hidden // 128, 8), F32),
        )
    ]
    assert LAYER.kernel is not None
    return LAYER.kernel.plan(types, types[:1], batch=None, chip=H200, expected_m=p.expected, out_dtype=BF16)


def test_five_launches_that_may_overlap() -> None:
    plan = plan_of(PROBLEM)
    launches = [step for step in plan.steps if isinstance(step, Launch)]
    assert len(launches) == len(plan.steps) == 5
    assert [one.pdl for one in launches] == [False, True, True, True, True]
    assert all(one.kernel.name.endswith("_chained") for one in launches)
    assert not any(one.cooperative or one.cluster > 1 for one in launches)
    assert [step["pdl"] for step in decode(encode(plan))["steps"]] == [one.pdl for one in launches]


def test_every_launch_reads_what_earlier_ones_give() -> None:
    """Scratch buffers: whose launches touch them, in order; the first touch is the one that writes."""
    plan = plan_of(PROBLEM)
    touched: dict[int, list[int]] = {}
    for i, step in enumerate(plan.steps):
        assert isinstance(step, Launch)
        for param in step.params:
            buffer = param.buffer if isinstance(param, TensorMap) else param
            if isinstance(buffer, Scratch):
                touched.setdefault(buffer.index, []).append(i)
    assert {index: sorted(set(at)) for index, at in touched.items()} == {
        0: [0, 2, 3],  # sizes
        1: [0, 4],  # position
        2: [0, 1],  # token
        3: [0, 2],  # row weights
        4: [1, 2],  # rows
        5: [1, 2],  # their scales
        6: [2, 3],  # activation
        7: [2, 3],  # its scales
        8: [3, 4],  # rows of y
    }
    assert plan.scratch_bytes == (
        128,
        512,
        512,
        512,
        128 * 7168,
        128 * 56 * 4,
        128 * 768,
        128 * 8 * 4,
        128 * 7168 * 2,
    )


def test_configurations_are_those_of_the_ops() -> None:
    for one in problems(PROBLEM)[2:4]:
        plain = dataclasses.replace(one, chained=False)
        assert GROUPED.choose(one, H200).config == GROUPED.choose(plain, H200).config


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hidden": 640}, "hidden is 640, need a multiple of 512"),
        ({"inner": 96}, "inner is 96, need a multiple of 128"),
        ({"tokens": 257}, "there are 2056 copies of tokens, at most 2048"),
        ({"experts": 1025}, "there are 1025 experts, at most 1024"),
        ({"expected": 65}, "65 rows of an expert are expected, at most 64"),
        ({"x": "float16"}, "x is float16, need bfloat16 or float32"),
    ],
    ids=str,
)
def test_what_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        FAMILY.choose(dataclasses.replace(PROBLEM, **change), H200)


def test_a_part_only_launches() -> None:
    part = Part(LaunchPlan((Memset(Result(0), 16),), label="zeros"), (), (Scratch(0),))
    with pytest.raises(ValueError, match="zeros is no part of a chain"):
        chained((part,), (16,), "two")


def test_buffers_are_renamed() -> None:
    kernel = next(step.kernel for step in plan_of(PROBLEM).steps if isinstance(step, Launch))
    one = LaunchPlan((Launch(kernel, (1, 1, 1), 32, (Operand(1, 8), Result(0))),))
    plan = chained(
        (
            Part(one, (Operand(0), Operand(2, 16)), (Scratch(1),)),
            Part(one, (Operand(0), Scratch(1)), (Result(0),)),
        ),
        (64, 64),
        "two",
    )
    params = [step.params for step in plan.steps if isinstance(step, Launch)]
    assert params == [(Operand(2, 24), Scratch(1)), (Scratch(1, 8), Result(0))]


def test_kinds_of_weights(in_a_chain: None) -> None:
    """Masters are quantised in the call, and go the same way."""
    x, ids, weights, *_ = operands()
    w13, w2 = normal(3, 4, 256, 512), normal(4, 4, 512, 128)
    masters = jax.jit(moe_mlp)(x, ids, weights, w13, w2)
    frozen = (jdg.quantize(w, (128, 128)) for w in (w13, w2))
    assert_equal(masters, jax.jit(moe_mlp)(x, ids, weights, *frozen))
    per_row = QuantizedArray(jnp.ones((4, 256, 512), jnp.float8_e4m3fn), jnp.ones((4, 256, 4)), (1, 128))
    assert not fits(x, ids, per_row, jdg.quantize(w2, (128, 128)))
