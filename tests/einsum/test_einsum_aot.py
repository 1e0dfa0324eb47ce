"""Einsums compiled for an H200 without one: one launch, nothing copied or transposed, maps over operands as
they are."""

from __future__ import annotations

import functools
import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import jax_deepgemm as jdg
from tests.gemm.test_aot import devices
from tests.shared.einsum_cases import PRODUCTS, shapes

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None
    or importlib.util.find_spec("jax_deepgemm._ffi") is None,
    reason="needs jax-cuda12-plugin and the built extension",
)

BF16, F32 = jnp.bfloat16, jnp.float32
MOVES = re.compile(r"= \S+ (?:copy|transpose|fusion|pad|slice|dynamic-slice|concatenate|while)[\w-]*\(")
SIZES = dict(zip("abcdghkmnrvxy", (8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104), strict=True))


def hlo(function: Any, *operands: Any) -> str:
    one = SingleDeviceSharding(devices()[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), operands)
    return jax.jit(function).lower(*placed).compile().as_text()


def launches(text: str) -> int:
    return text.count('custom_call_target="jax_deepgemm_launch"')


@pytest.mark.parametrize("expr", PRODUCTS)
def test_operands_are_read_as_they_are_stored(expr: str) -> None:
    pytest.importorskip("cuda.core")
    a, b, _ = (jax.ShapeDtypeStruct(shape, BF16) for shape in shapes(expr, SIZES))
    text = hlo(functools.partial(jdg.bf16_einsum, expr), a, b)
    assert launches(text) == 1
    assert not MOVES.findall(text), text


@pytest.mark.parametrize("expr", ["bhr,hdr->bhd", "bmk,bnk->mn"])
def test_gradients_move_nothing(expr: str) -> None:
    """Two further einsums, of the cotangent as it came."""
    pytest.importorskip("cuda.core")
    a, b, d = (jax.ShapeDtypeStruct(shape, BF16) for shape in shapes(expr, SIZES))

    def gradients(a: Any, b: Any, d: Any) -> Any:
        return jax.vjp(functools.partial(jdg.bf16_einsum, expr), a, b)[1](d)

    text = hlo(gradients, a, b, d)
    assert launches(text) == 2
    assert not MOVES.findall(text), text


def test_fp8_and_mapped_heads_are_one_launch() -> None:
    pytest.importorskip("cuda.core")
    a, b, _ = (jax.ShapeDtypeStruct(shape, BF16) for shape in shapes("bhr,hdr->bhd", SIZES | {"r": 512}))
    x, w = (
        jax.eval_shape(functools.partial(jdg.quantize, block=k), y)
        for k, y in (((1, 128), a), ((128, 128), b))
    )
    text = hlo(functools.partial(jdg.fp8_einsum, "bhr,hdr->bhd"), x, w)
    assert launches(text) == 1
    assert not MOVES.findall(text), text
    rows = jax.ShapeDtypeStruct((3, *a.shape), BF16)
    mapped = jax.vmap(functools.partial(jdg.bf16_einsum, "bhr,hdr->bhd"), in_axes=(0, None))
    assert not MOVES.findall(hlo(mapped, rows, b))


def test_a_copy_would_be_seen() -> None:
    a, b, _ = (jax.ShapeDtypeStruct(shape, BF16) for shape in shapes("bhr,hdr->bhd", SIZES))
    text = hlo(lambda a, b: jdg.bf16_einsum("bhr,hdr->bhd", a, jnp.swapaxes(b, 1, 2).reshape(b.shape)), a, b)
    assert MOVES.findall(text)
