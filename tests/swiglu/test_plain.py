"""Activations that are not quantised, as ops: in the types of layers, under every transformation, and the
kernels' own source on a CPU. Against float64: test_activations.py."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

from jax_deepgemm import export_checks
from jax_deepgemm.activation import GPT_OSS, Activation, swiglu
from jax_deepgemm.core.chip import H200
from jax_deepgemm.core.family import Given
from jax_deepgemm.ops.quantize.activation import SILU
from jax_deepgemm.ops.swiglu import reference
from jax_deepgemm.ops.swiglu.family import FAMILY
from jax_deepgemm.ops.swiglu.problem import SwigluProblem
from jax_deepgemm.ops.swiglu.sm90 import cut_of, kernel_name, kernel_source
from tests.shared import native_kernels, op_checks
from tests.shared.activations import ACTIVATIONS, activate, repeated
from tests.shared.arrays import normals
from tests.shared.device_code import fields_of_concept, fields_of_struct
from tests.shared.native_kernels import NativeCall
from tests.shared.op_checks import OpCase, Shard
from tests.swiglu.test_fused import draw

F32 = np.float32


def operands(seed: int, activation: Activation = SILU) -> list[jax.Array]:
    h, weight = normals(seed, (8, 32 * activation.halves), (8,))
    return [h.astype(jnp.float32), weight.astype(jnp.float32)]


def case(name: str, activation: Activation) -> OpCase:
    def function(h: jax.Array, weight: jax.Array, out_sharding: Any = None) -> jax.Array:
        return swiglu(h, weight, activation=activation)

    def plain(h: jax.Array, weight: jax.Array) -> jax.Array:
        return reference.act(h, weight, None, activation)

    return OpCase(
        name,
        function,
        functools.partial(operands, activation=activation),
        nests=(((0, 0),), ((0, None), (None, 0))),
        shards=(
            Shard((P("x"), P("x")), P("x"), modes=("auto", "explicit", "shard_map")),
            Shard((P(), P()), P(None, "y"), modes=("auto",)),
        ),
        plain=plain,
        wrt=(0, 1),
        second=True,
    )


CASES = [case("silu", SILU), case("gpt-oss", GPT_OSS), case("relu2", Activation("relu2"))]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check):
    check()


@pytest.mark.any_version
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_once(dtype):
    """As the formula in float32, rounded; so are both gradients, that of the weight in float32."""
    h, weight = (one.astype(dtype) for one in operands(0))
    dact = normals(1, (8, 32))[0].astype(dtype)
    wide, weight = h.astype(F32), weight.astype(F32)
    act, vjp = jax.vjp(lambda h, w: reference.act(h, w, None), wide, weight)
    dh, dweight = vjp(dact.astype(F32))
    got, vjp = jax.vjp(swiglu, h, weight)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(act.astype(dtype)))
    near = jnp.finfo(dtype).eps
    got_h, got_weight = vjp(dact)
    assert (got_h.dtype, got_weight.dtype) == (h.dtype, F32)
    np.testing.assert_allclose(np.asarray(got_h, F32), dh, rtol=near, atol=1e-6)
    np.testing.assert_allclose(got_weight, dweight, rtol=1e-5, atol=1e-5)


def test_any_rank_and_other_types():
    h = normals(0, (2, 3, 4, 16))[0].astype(jnp.float32)
    want = reference.act(h, None, None)
    np.testing.assert_allclose(swiglu(h), want, rtol=1e-6)
    np.testing.assert_allclose(swiglu(h[0, 0, 0], jnp.float32(2)), 2 * want[0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(swiglu(h, h[..., 0]), want * h[..., :1], rtol=1e-6)
    small = h.astype(jnp.float8_e5m2)
    assert swiglu(small).dtype == small.dtype


def test_symbolic_sizes_take_the_plain_form():
    (rows,) = export.symbolic_shape("r")
    given = jax.ShapeDtypeStruct((rows, 16), jnp.bfloat16)
    for platform in ("cpu", "cuda"):
        exported = export.export(jax.jit(swiglu), platforms=[platform], disabled_checks=export_checks)(given)
        assert "jax_deepgemm_launch" not in exported.mlir_module()
    assert exported.out_avals[0].shape == (rows, 8)


# The kernels, without a GPU -----------------------------------------------------------------------------


def lowered(function: Any, *shapes: tuple[int, ...]) -> str:
    given = [jax.ShapeDtypeStruct(one, jnp.bfloat16 if len(one) > 1 else F32) for one in shapes]
    return jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.any_version
def test_a_launch_each_forward_and_backward():
    pytest.importorskip("cuda.core")
    pytest.importorskip("jax_deepgemm._ffi")
    both = lambda h, w, d: (swiglu(h, w), jax.vjp(swiglu, h, w)[1](d))  # noqa: E731
    text = lowered(both, (64, 256), (64,), (64, 128))
    assert text.count("swiglu grad 64x128 bfloat16 weights") == 1
    assert text.count("@jax_deepgemm_launch(") - text.count("swiglu act 64x128 bfloat16 weights") == 1
    stacked = lambda h, w: swiglu(h, w)  # noqa: E731
    assert "swiglu act 192x128 bfloat16" in lowered(jax.vmap(stacked, (0, None)), (3, 64, 256), (64,))


PROBLEMS = [
    SwigluProblem(kind, 256, width, x, weighted, activation)
    for kind, activation, (width, x, weighted) in itertools.product(
        ("act", "grad"),
        ACTIVATIONS.values(),
        ((2048, "bfloat16", True), (768, "float16", False), (2048, "float32", True), (131, "bfloat16", True)),
    )
]


@pytest.mark.any_version
@pytest.mark.parametrize("kind", ["act", "grad"])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_ptxas_is_content(kind, activation):
    pytest.importorskip("cuda.core")
    for problem in PROBLEMS:
        if (problem.kind, problem.activation) != (kind, activation):
            continue
        [launch] = FAMILY.plan(problem, H200, given_of(problem)).steps
        cut = cut_of(problem)
        assert not launch.kernel.report.problems(), problem
        assert launch.grid[0] * 8 == 256 * cut.pieces
        assert cut.pieces * cut.held * 256 >= (problem.width if kind == "act" else 1)


def given_of(p: SwigluProblem) -> dict[str, Given]:
    names = ["h", *["weight"] * p.weighted, *["dact"] * (p.kind == "grad")]
    return {name: Given(i, (p.rows,)) for i, name in enumerate(names)}


def test_every_field_of_the_policy_is_documented():
    documented = fields_of_concept("swiglu/plain.cuh", "PlainConfig")
    assert all(len(words) > 8 for words in documented.values()), documented
    for problem in PROBLEMS:
        assert fields_of_struct(kernel_source(problem).text, "Config") == sorted(documented)


def test_names_tell_kernels_apart():
    names = {kernel_name(problem) for problem in PROBLEMS}
    assert len(names) == len({kernel_source(problem).text for problem in PROBLEMS})
    assert all(name.isidentifier() for name in names)


def native_call(kind: str, activation: Activation, width: int, x: str, shared: bool = False) -> NativeCall:
    """shared: one matrix of weights serves a batch of two."""
    matrices = 2 if shared else 1
    h, dact = draw((11 * matrices, width * activation.halves)), draw((11 * matrices, width), seed=1)
    weight = draw((11,), F32, 2)
    problem = SwigluProblem(kind, len(h), width, x, True, activation)
    arrays = [h.astype(x), weight, *([dact.astype(x)] if kind == "grad" else [])]
    batched = {"h": shared, "weight": False, "dact": shared}
    given = {
        name: Given(i, (matrices,) * batched[name] + (11, 0), batched[name])
        for i, name in enumerate(("h", "weight", "dact")[: len(arrays)])
    }
    results = [np.full((len(h), width), 77, x)]
    if kind == "grad":
        results = [np.full(h.shape, 77, x), np.full(len(h), 77, F32)]
    return NativeCall(kernel_source(problem), FAMILY.plan(problem, H200, given), arrays, results)


@pytest.mark.any_version
def test_the_kernels_on_a_cpu(tmp_path: Path) -> None:
    """Rows of several pieces, of one not full, and not of whole vectors; every place of gate and up."""
    pytest.importorskip("cuda.core")
    kinds = [
        (name, *form)
        for name in ("silu", "gpt-oss", "gelu clipped", "relu2")
        for form in ((1160, "bfloat16", True), (24, "bfloat16", False), (37, "float32", False))
    ]
    kinds += [("gpt-oss", 520, "float32", True)]
    calls = [
        native_call(kind, ACTIVATIONS[name], width, x, shared)
        for name, width, x, shared in kinds
        for kind in ("act", "grad")
    ]
    found = native_kernels.run(tmp_path, calls)
    forms = [kinds[i // 2] for i in range(len(calls))]
    for (name, *_), call, got in zip(forms, calls, found, strict=True):
        check(ACTIVATIONS[name], call, got)


def check(activation: Activation, call: NativeCall, got: list[np.ndarray]) -> None:
    h, weight, *dact = (one.astype(np.float64) for one in call.operands)
    act, partials = activate(h, activation)
    weights = np.tile(weight, len(h) // len(weight))[:, None]
    rounding = float(jnp.finfo(got[0].dtype).eps)
    near = functools.partial(np.testing.assert_allclose, rtol=max(rounding, 1e-5), err_msg=call.source.name)
    if not dact:
        near(got[0].astype(np.float64), act * weights, atol=1e-5 * np.abs(act).max())
        return
    wanted = partials * repeated(dact[0], activation) * weights
    near(got[0].astype(np.float64), wanted, atol=1e-5 * np.abs(wanted).max())
    sums = (act * dact[0]).sum(axis=1)
    np.testing.assert_allclose(got[1], sums, rtol=1e-4, atol=1e-4 * np.abs(sums).max())
