"""Activations of experts against float64: plain, quantised, their gradients, over devices, and compiled."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_deepgemm.activation import GPT_OSS, Activation, swiglu, swiglu_grad_quantize, swiglu_quantize
from jax_deepgemm.ops.quantize.problem import QuantizeProblem
from jax_deepgemm.ops.quantize.sm90 import cut_of, kernel_source
from jax_deepgemm.tools.precompile import compile_many
from tests.shared import op_checks
from tests.shared.activations import ACTIVATIONS, activate, repeated
from tests.shared.arrays import normals
from tests.shared.device_code import fields_of_concept, fields_of_struct
from tests.shared.op_checks import OpCase, Shard
from tests.swiglu.test_fused import assert_quantizes, draw

F32 = np.float32
every = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)


@pytest.mark.any_version
@every
@pytest.mark.parametrize(("m", "i", "rows"), [(130, 136, 77), (3, 5, 3)])
def test_quantised_against_float64(m, i, rows, activation):
    h, dact, weight = draw((m, activation.halves * i)), draw((m, i), seed=1), draw((m,), F32, 2)
    act, partials = activate(h, activation)
    d, w = dact.astype(np.float64), weight.astype(np.float64)
    wanted = [act * w[:, None], partials * repeated(d, activation) * w[:, None], (act * d).sum(axis=1)]
    for poisoned in (*wanted, h, dact, weight):
        poisoned[rows:] = np.nan if any(poisoned is x for x in (h, dact, weight)) else 0
    forth, back = (
        jax.jit(functools.partial(f, activation=activation)) for f in (swiglu_quantize, swiglu_grad_quantize)
    )
    assert_quantizes(wanted[0], *forth(h, weight, jnp.int32(rows)))
    *parts, dweight = back(h, weight, dact, jnp.int32(rows))
    assert_quantizes(wanted[1], *parts)
    np.testing.assert_allclose(dweight, wanted[2], rtol=1e-4, atol=1e-4 * np.abs(wanted[2]).max())


@pytest.mark.any_version
@every
def test_plain_and_its_gradients(activation):
    h, weight, dact = draw((6, activation.halves * 16), F32), draw((6,), F32, 1), draw((6, 16), F32, 2)
    act, partials = activate(h, activation)
    got, vjp = jax.vjp(functools.partial(swiglu, activation=activation), h, weight)
    np.testing.assert_allclose(got, act * weight[:, None], rtol=1e-4, atol=1e-4)
    dh, dweight = vjp(jnp.asarray(dact))
    wanted = partials * repeated(dact, activation) * weight[:, None]
    np.testing.assert_allclose(dh, wanted, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(dweight, (act * dact).sum(axis=1), rtol=1e-3, atol=1e-3)


def test_names_are_the_plain_activations():
    h = draw((4, 32), F32)
    for name in ("silu", "gelu", "relu2"):
        np.testing.assert_array_equal(
            swiglu(h, activation=name), swiglu(h, activation=ACTIVATIONS[name]), strict=True
        )


@pytest.mark.any_version
@every
def test_far_numbers_and_nan(activation):
    """Where the sigmoid is 0 or 1 slopes are finite; NaN stays NaN, clipped or not."""
    x = np.array([1e4, -1e4, 1e15, -1e15, 7.0, -7.0, 10.0, 0.0], F32)
    h = np.stack([x, x[::-1]], axis=1)[:, : activation.halves]
    act, partials = activate(np.clip(h, -1e15, 1e15), activation) if activation.limit else (None, None)
    got, vjp = jax.vjp(functools.partial(swiglu, activation=activation), jnp.asarray(h))
    (dh,) = vjp(jnp.ones_like(got))
    assert np.isfinite(got).all()
    assert np.isfinite(dh).all()
    if act is not None:
        np.testing.assert_allclose(got, act, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(dh, partials, rtol=1e-3, atol=1e-3)
    for column in range(activation.halves):
        one = np.ones((1, activation.halves), F32)
        one[0, column] = np.nan
        assert np.isnan(swiglu(jnp.asarray(one), activation=activation)).all()


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ("swish", r"activation is 'swish', need 'silu', 'gelu', 'relu2', or a"),
        (Activation("swish"), r"activation is 'swish', need"),
        (jax.nn.silu, r"activation is <.*, need 'silu'"),
        (Activation(limit=0.0), r"has limit 0.0, need a positive number"),
        (Activation("gelu", alpha=1.702), r"'gelu' has alpha 1.702, which only 'silu' has"),
        (Activation("relu2", interleaved=True), r"'relu2' has no gate.*leave them out"),
    ],
)
def test_errors(activation, message):
    h = np.ones((4, 256), F32)
    for call in (swiglu, swiglu_quantize):
        with pytest.raises(ValueError, match=f"{call.__name__}: .*{message}"):
            call(h, activation=activation)


# Sharded as unsharded -----------------------------------------------------------------------------------

R = P("x")
ROWS_X = (P("x"), P("x"), P(None, "x"), P("x"))


def cases(name: str, activation: Activation) -> list[OpCase]:
    def forward(h: Any, weight: Any, out_sharding: Any = None) -> Any:
        return swiglu_quantize(h, weight, activation=activation)

    def backward(h: Any, weight: Any, dact: Any, out_sharding: Any = None) -> Any:
        return swiglu_grad_quantize(h, weight, dact, activation=activation)

    def arrays(seed: int) -> list[jax.Array]:
        h, dact = normals(seed, (512, 256 * activation.halves), (512, 256))
        return [h, jnp.asarray(np.random.default_rng(seed).uniform(size=512), jnp.float32), dact]

    features = (P(None, "x"), P(None, "x"), P("x"), P(None, "x"))
    return [
        OpCase(
            f"forward-{name}",
            forward,
            lambda seed: arrays(seed)[:2],
            (((0, None),),),
            (Shard((R, R), ROWS_X), Shard((P(), P()), features, (), ("auto",))),
            tolerance=1e-6,
        ),
        OpCase(
            f"backward-{name}",
            backward,
            arrays,
            (((0, 0, None),),),
            (Shard((R, R, R), (*ROWS_X, R)), Shard((P(), P(), P()), (*features, P()), (), ("auto",))),
            tolerance=1e-6,
        ),
    ]


CASES = [case for name in ("gpt-oss", "relu2") for case in cases(name, ACTIVATIONS[name])]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_transformations(check):
    check()


# The kernels, without a GPU -----------------------------------------------------------------------------

KERNELS = [
    QuantizeProblem(
        kind, 256, columns * (a.halves if kind == "swiglu_grad" else 1), transposed=True, limited=True,
        weighted=True, activation=a,
    )
    for kind, columns, a in itertools.product(
        ("swiglu", "swiglu_grad"), (256, 131), [a for a in ACTIVATIONS.values() if a.tag]
    )
]  # fmt: skip
KERNELS += [
    QuantizeProblem(
        "swiglu_grad", 256, columns, x, weighted=True, activation=ACTIVATIONS["deepseek-v4"], **more
    )
    for columns, x, more in (
        (512, "bfloat16", {"ue8m0": True}),
        (512, "bfloat16", {"blocks": 5, "transposed": True}),
        (262, "float32", {"transposed": True}),
    )
]


@functools.cache
def compiled() -> dict[str, Any]:
    pytest.importorskip("cuda.core")
    sources = {source.name: source for source in map(kernel_source, KERNELS)}
    return {one.name: one for one in compile_many(list(sources.values()), progress=False)}


@pytest.mark.any_version
@pytest.mark.parametrize("problem", KERNELS, ids=str)
def test_ptxas_is_content(problem):
    source, shape = kernel_source(problem), cut_of(problem)
    report = compiled()[source.name].report
    assert report.problems() == ()
    assert report.registers * shape.threads * shape.blocks_per_sm <= 65_536
    assert (report.static_smem_bytes + source.shared_memory + 1024) * shape.blocks_per_sm <= 228 * 1024


def test_every_field_of_the_policy_is_documented():
    documented = fields_of_concept("swiglu/activation.cuh", "Activation")
    assert all(len(words) > 8 for words in documented.values()), documented
    for problem in KERNELS:
        assert fields_of_struct(kernel_source(problem).text, "Act") == sorted(documented)


def test_names_tell_kernels_apart():
    names = [kernel_source(problem).name for problem in KERNELS]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)
    assert GPT_OSS.tag == "clip7_alpha1p702_plus1_interleaved"
