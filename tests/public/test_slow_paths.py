"""Products that no kernel runs: said once where lowered for a GPU, shown by explain, silent on CPUs."""

from __future__ import annotations

import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_deepgemm as jdg
from jax_deepgemm.log import note_once
from jax_deepgemm.ops.ragged_dot import op as ragged_ops
from tests.shared import ragged_oracle as oracle

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
SIZES = np.array([3, 0, 5], np.int32)
OURS = lax.DotAlgorithmPreset.BF16_BF16_F32
SAME = {
    "preset": OURS,
    "string": "BF16_BF16_F32",
    "pair": ("BF16_BF16_F32", "BF16_BF16_F32"),
    "algorithm": lax.DotAlgorithm(jnp.bfloat16, jnp.bfloat16, jnp.float32),
}
LAUNCH = "@jax_deepgemm_launch"


def operands(lhs: Any = BF16, rhs: Any = BF16) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(oracle.integers((8, 16), lhs)), jnp.asarray(oracle.integers((3, 16, 24), rhs))


def lowered(function: Any, *arrays: Any, platforms: tuple[str, ...] = ("cuda",)) -> str:
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=platforms).as_text()


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> Any:
    note_once.cache_clear()
    with caplog.at_level(logging.INFO, "jax_deepgemm"):
        yield lambda: [r.getMessage() for r in caplog.records if "runs on XLA" in r.getMessage()]


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("how", SAME)
def test_an_algorithm_that_is_the_kernels_reaches_them(how: str, dtype: Any, notes: Any) -> None:
    pytest.importorskip("cuda.core")
    lhs, rhs = operands(dtype, dtype)
    product = lambda x, w: jdg.ragged_dot(x, w, SIZES, precision=SAME[how])  # noqa: E731
    assert lowered(product, lhs, rhs).count(LAUNCH) == 1
    assert notes() == []
    got, jaxs = product(lhs, rhs), lax.ragged_dot(lhs, rhs, SIZES, precision=OURS)
    assert got.dtype == jaxs.dtype
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(jaxs, np.float32))


def test_blocks_without_a_kernel_are_said(notes: Any) -> None:
    x = operands()[0]
    lowered(lambda x: jdg.quantize(x, (1, 64)).values, x)
    assert len(notes()) == 1
    assert "block (1, 64) runs on XLA: there are kernels for (1, 128), (128, 128)" in notes()[0]
    lowered(lambda x: jdg.quantize(x, (1, 64)).values, x, platforms=("cpu",))
    assert len(notes()) == 1
    (call,) = jdg.explain(lambda x: jdg.quantize(x, (1, 64)).values, x, show=False)
    assert call.note.endswith("(32, 32).")


def test_float32_keeps_its_gradients_dtype() -> None:
    """Rounded to bfloat16 by the caller's word, forward and backward; gradients have the operands' dtype."""
    pytest.importorskip("cuda.core")
    lhs, rhs = operands(F32, F32)
    grads = jax.grad(lambda x, w: jdg.ragged_dot(x, w, SIZES, precision=OURS).sum(), (0, 1))
    assert lowered(grads, lhs, rhs).count(LAUNCH) == 2
    assert [g.dtype for g in grads(lhs, rhs)] == [F32, F32]
    with jax.default_matmul_precision("BF16_BF16_F32"):
        assert lowered(lambda x, w: jdg.ragged_dot(x, w, SIZES), lhs, rhs).count(LAUNCH) == 1


SLOW: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "bfloat16 x int8": (BF16, jnp.int8, {}, r"not bfloat16 and int8\. Convert both"),
    "bfloat16 x float32": (BF16, F32, {}, r"not bfloat16 and float32\. .*precision='BF16_BF16_F32'"),
    "float16": (F16, F16, {}, r"not float16 and float16"),
    "float16 result": (
        BF16,
        BF16,
        {"preferred_element_type": F16},
        r"write bfloat16 or float32, not float16",
    ),
    "algorithm": (BF16, BF16, {"precision": "F32_F32_F32"}, r"precision asks for F32_F32_F32\. Leave it out"),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_fall_to_xla_is_said_once_on_a_gpu(name: str, notes: Any) -> None:
    left, right, options, says = SLOW[name]
    product = lambda x, w: jdg.ragged_dot(x, w, SIZES, **options)  # noqa: E731
    lhs, rhs = operands(left, right)
    lowered(product, lhs, rhs, platforms=("cpu",))
    product(lhs, rhs)
    assert notes() == []
    for platforms in (("cuda",), ("cpu", "cuda")):
        assert LAUNCH not in lowered(product, lhs, rhs, platforms=platforms)
    (note,) = notes()
    assert note.startswith(f"ragged_dot (nn) of {lhs.dtype.name}[8, 16] x {rhs.dtype.name}[3, 16, 24]")
    assert re.search(says, note), note


@pytest.mark.parametrize("name", SLOW)
def test_explain_shows_it(name: str) -> None:
    left, right, options, _ = SLOW[name]
    lhs, rhs = operands(left, right)
    (call,) = jdg.explain(lambda x, w: jdg.ragged_dot(x, w, SIZES, **options), lhs, rhs, show=False)
    assert call.op == "ragged_dot_nn"
    assert "runs on XLA, which is slow on a GPU" in call.note
    assert call.note in str(call)
    assert call.kernels == call.candidates == ()


FOLLOWED: dict[str, Any] = {
    "bfloat16 x int8": lambda x, w: jdg.ragged_dot(x.astype(BF16), w.astype(BF16), SIZES),
    "bfloat16 x float32": lambda x, w: jdg.ragged_dot(x, w, SIZES, precision="BF16_BF16_F32"),
    "float16": lambda x, w: jdg.ragged_dot(x.astype(BF16), w.astype(BF16), SIZES),
    "float16 result": lambda x, w: jdg.ragged_dot(x, w, SIZES, preferred_element_type=F32).astype(F16),
    "algorithm": lambda x, w: jdg.ragged_dot(x, w, SIZES),
}


@pytest.mark.parametrize("name", SLOW)
def test_what_the_note_advises_reaches_the_kernels(name: str, notes: Any) -> None:
    pytest.importorskip("cuda.core")
    lhs, rhs = operands(*SLOW[name][:2])
    assert lowered(FOLLOWED[name], lhs, rhs).count(LAUNCH) == 1
    assert notes() == []


def test_gradients_that_fall_to_xla_are_said_too(notes: Any) -> None:
    lhs, rhs = operands(F16, F16)
    lowered(jax.grad(lambda x, w: jdg.ragged_dot(x, w, SIZES).sum(), (0, 1)), lhs, rhs)
    assert sorted(note.split(" of ")[0] for note in notes()) == ["ragged_dot (nt)", "ragged_dot (tn)"]


def test_algorithms() -> None:
    is_kernels = ragged_ops.is_kernels
    presets = lax.DotAlgorithmPreset
    assert [one.name for one in presets if is_kernels(one)] == ["DEFAULT", "BF16_BF16_F32"]
    assert not is_kernels(
        lax.DotAlgorithm(jnp.bfloat16, jnp.bfloat16, jnp.float32, num_primitive_operations=3)
    )
    assert not is_kernels(lax.DotAlgorithm(jnp.float32, jnp.float32, jnp.float32))
