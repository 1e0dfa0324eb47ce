"""bf16_einsum and fp8_einsum: values, every transformation of JAX, plans, errors."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm.core.chip import H200
from jax_deepgemm.ops.gemm.family import FAMILY, GemmProblem
from jax_deepgemm.tools.explain import problems
from tests.shared import op_checks
from tests.shared.einsum_cases import PRODUCTS, draw, error, exact, shapes
from tests.shared.op_checks import OpCase, Shard

BF16, F32 = jnp.bfloat16, jnp.float32
UP, DOWN, SUM = "bhr,hdr->bhd", "bhd,hdr->bhr", "bmk,bnk->mn"
PER_ROW, BLOCKED = (1, 128), (128, 128)


def run(*arrays: Any, expr: str, out: str, out_sharding: Any = None) -> jax.Array:
    return jdg.bf16_einsum(expr, *arrays, out_dtype=out, out_sharding=out_sharding)


def plain(*arrays: Any, expr: str, out: str) -> jax.Array:
    a, b, *c = (x.astype(F32) for x in arrays)
    return sum(c, jnp.einsum(expr, a, b)).astype(out)


def operands(expr: str, sizes: dict[str, int], add: bool, seed: int) -> list[jax.Array]:
    a, b, c = draw(expr, sizes, seed)
    return [a, b, *([c.astype(F32)] if add else [])]


def bf16_case(expr: str, sizes: dict[str, int], add: bool = False, **fields: Any) -> OpCase:
    params = {"expr": expr, "out": "float32"}
    count = 3 if add else 2
    return OpCase(
        f"bf16-{expr}" + ("-add" if add else ""),
        functools.partial(run, **params),
        functools.partial(operands, expr, sizes, add),
        plain=functools.partial(plain, **params),
        wrt=tuple(range(count)),
        grad_tolerance=2**-6,
        **fields,
    )


def run_fp8(a: Any, sa: Any, b: Any, sb: Any, out_sharding: Any = None) -> jax.Array:
    return jdg.fp8_einsum(UP, (a, sa), (b, sb), out_dtype="float32", out_sharding=out_sharding)


def fp8_operands(seed: int) -> list[jax.Array]:
    x, w, _ = draw(UP, {"b": 8, "h": 2, "d": 288, "r": 544}, seed)  # a quarter ends inside blocks
    x, w = jdg.quantize(x, PER_ROW), jdg.quantize(w, BLOCKED)
    return [x.values, x.scales, w.values, w.scales]


HEADS = {"b": 8, "h": 4, "d": 24, "r": 16}
CASES = [
    bf16_case(
        UP,
        HEADS,
        nests=(((0, None),), ((1, 0),)),
        shards=(
            Shard((P("x", "y"), P("y")), P("x", "y"), modes=("auto", "explicit", "shard_map")),
            Shard((P(None, None, "y"), P(None, None, "y")), P(), ("all-reduce",)),
            Shard((P("y", None, "x"), P(None, None, "x")), P("y", None, "x"), ("reduce-scatter",)),
        ),
        second=True,
    ),
    bf16_case(DOWN, HEADS, add=True, nests=(((0, 0, 0),),)),
    bf16_case(
        SUM,
        {"b": 4, "m": 8, "n": 12, "k": 16},
        nests=(((0, None),),),
        shards=(Shard((P("y"), P("y")), P(), ("all-reduce",)),),
    ),
    OpCase(
        "fp8",
        run_fp8,
        fp8_operands,
        nests=(((0, 0, None, None),),),
        shards=(
            Shard((P("x", None), P("x"), P(None, "y"), P()), P("x", None, "y")),
            Shard((P(None, None, "y"), P(), P(None, None, "y"), P()), P(), ("all-reduce",)),
        ),
    ),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check) -> None:
    check()


sizes = st.fixed_dictionaries({letter: st.sampled_from((1, 2, 3, 5, 8, 9)) for letter in "abcdghkmnrvxy"})


@settings(max_examples=12)
@given(st.sampled_from(sorted(PRODUCTS)), sizes, st.booleans(), st.booleans())
def test_drawn_shapes(expr: str, drawn: dict[str, int], add: bool, wide: bool) -> None:
    out = F32 if wide else BF16
    a, b, c = draw(expr, drawn)
    addend = c.astype(out) if add else None
    got = jdg.bf16_einsum(expr, a, b, addend, out_dtype=out)
    assert (got.shape, got.dtype) == (shapes(expr, drawn)[2], out)
    assert error(got, exact(expr, a, b, addend)) < (1e-6 if wide else 2**-8)


@pytest.mark.parametrize("empty", "bhdr")
def test_empty_dimensions(empty: str) -> None:
    a, b, c = draw(UP, HEADS | {empty: 0})
    assert jdg.bf16_einsum(UP, a, b, c).shape == c.shape
    got = jdg.bf16_einsum(UP, a, b)
    assert got.shape == c.shape
    assert not np.asarray(got).any()


def fp8_numbers(x: Any) -> np.ndarray:
    return np.asarray(jdg.dequantize(x)).astype(np.float64)


@pytest.mark.parametrize("expr", [UP, "hdr,bhr->bhd", "hdb,hrb->hdr", "bhr,dhr->bhd"])
@pytest.mark.parametrize("block", [BLOCKED, PER_ROW], ids=str)
def test_fp8(expr: str, block: tuple[int, int]) -> None:
    """b, or of exchanged operands a, may have scales of 128x128 if its rows are the result's columns."""
    a, b, c = draw(expr, {"b": 132, "h": 2, "d": 140, "r": 260})
    exchanged = expr.startswith("hdr,")
    blocks = [PER_ROW, block]
    if expr == "bhr,dhr->bhd" and block == BLOCKED:
        with pytest.raises(ValueError, match=r"b has one scale per block \(128, 128\), need \(1, 128\)"):
            jdg.fp8_einsum(expr, jdg.quantize(a, PER_ROW), jdg.quantize(b, BLOCKED))
        return
    a, b = (
        jdg.quantize(x, one) for x, one in zip((a, b), blocks[::-1] if exchanged else blocks, strict=True)
    )
    got = jdg.fp8_einsum(expr, a, b, c)
    assert error(got, exact(expr, fp8_numbers(a), fp8_numbers(b), c)) < 2**-8
    tuples = jdg.fp8_einsum(expr, (a.values, a.scales), (b.values, b.scales), c)
    np.testing.assert_array_equal(tuples, got)


def problem_of(function: Any, *operands: Any) -> GemmProblem:
    [(problem, _)] = problems(function, *operands)
    assert isinstance(problem, GemmProblem)
    return problem


@pytest.mark.parametrize("expr", PRODUCTS)
def test_problems_have_a_plan_that_reads_operands_as_they_are(expr: str) -> None:
    """Tensor maps cover the whole operand, with the strides of its dimensions as they are stored."""
    drawn = dict(zip("abcdghkmnrvxy", (8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104), strict=True))
    a, b, c = (jax.ShapeDtypeStruct(shape, BF16) for shape in shapes(expr, drawn))
    problem = problem_of(functools.partial(jdg.bf16_einsum, expr), a, b, c)
    stored, layout = PRODUCTS[expr]
    assert problem.layout == layout
    assert problem.stored in ("", stored)
    assert problem.flops == 2 * np.prod([drawn[letter] for letter in set(expr) - set(",->")])
    assert FAMILY.choose(problem, H200).config is not None


def test_tiles_of_all_heads_come_together_where_rows_stream_by() -> None:
    def problem(b: int, h: int, d: int, r: int) -> GemmProblem:
        a, w = jax.ShapeDtypeStruct((b, h, r), BF16), jax.ShapeDtypeStruct((h, d, r), BF16)
        return problem_of(functools.partial(jdg.bf16_einsum, UP), a, w)

    assert problem(4096, 128, 128, 512).batches_together
    assert not problem(128, 128, 128, 512).batches_together, "one tile of rows"
    assert not problem(4096, 8, 1024, 4096).batches_together, "weights that L2 does not hold"


def test_exported_for_both_platforms() -> None:
    """The kernel's launch is in the program, and no Python of this package is needed to run it."""
    a, b, _ = draw(UP, HEADS)
    function = jax.jit(functools.partial(jdg.bf16_einsum, UP))
    exported = jax.export.export(function, platforms=["cpu", "cuda"], disabled_checks=jdg.export_checks)(a, b)
    assert "jax_deepgemm_launch" in exported.mlir_module()
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(a, b), function(a, b))


X, W = jax.ShapeDtypeStruct((4, 3, 256), BF16), jax.ShapeDtypeStruct((3, 128, 256), BF16)


def zeros(x: Any, dtype: Any = None) -> jax.Array:
    return jnp.zeros(x.shape, dtype or x.dtype)


ERRORS = {
    "others": (
        lambda: jdg.bf16_einsum("bqhd,bkhd->bhqk", zeros(X), zeros(W)),
        r"bf16_einsum: 'bqhd,bkhd->bhqk' does not keep 'b' and 'h', .* jnp.einsum\('bqhd,bkhd->bhqk', a, b\)",
    ),
    "sizes": (
        lambda: jdg.bf16_einsum(UP, zeros(X), zeros(W)[:2]),
        r"'bhr,hdr->bhd' of a \[4, 3, 256\] and b \[2, 128, 256\]: 'h' is 3 in a and 2 in b",
    ),
    "sizes exchanged": (
        lambda: jdg.bf16_einsum("hdr,bhr->bhd", zeros(W)[:2], zeros(X)),
        r"of a \[2, 128, 256\] and b \[4, 3, 256\]: 'h' is 3 in b and 2 in a",
    ),
    "rank": (
        lambda: jdg.bf16_einsum(UP, zeros(X)[0], zeros(W)),
        r"bf16_einsum: a is bfloat16 \[3, 256\], need 3 dimensions \[b, h, r\]",
    ),
    "dtype": (
        lambda: jdg.bf16_einsum(UP, zeros(X, F32), zeros(W)),
        r"bf16_einsum: a is float32 \[4, 3, 256\], need bfloat16. Convert it: a.astype\(jnp.bfloat16\)",
    ),
    "c": (
        lambda: jdg.bf16_einsum(UP, zeros(X), zeros(W), jnp.zeros((4, 3, 127), BF16)),
        r"c is bfloat16 \[4, 3, 127\], need bfloat16 \[4, 3, 128\]: the result's shape",
    ),
    "fp8 down": (
        lambda: jdg.fp8_einsum(DOWN, jdg.quantize(zeros(W)), jdg.quantize(zeros(W))),
        r"not the last dimension of b \[h, d, r\]: .* Quantise b as \[h, r, d\] and say 'bhd,hrd->bhr'",
    ),
    "fp8 gradient": (
        lambda: jdg.fp8_einsum("bhd,bhr->hdr", jdg.quantize(zeros(X)), jdg.quantize(zeros(X))),
        r"not the last dimension of a \[b, h, d\]: .* Quantise a as \[h, d, b\] and say 'hdb,bhr->hdr'",
    ),
    "fp8 sum": (
        lambda: jdg.fp8_einsum(SUM, jdg.quantize(zeros(X)), jdg.quantize(zeros(X))),
        r"sums over 'b' and 'k', need one summed letter, .* use bf16_einsum",
    ),
    "fp8 of bf16": (
        lambda: jdg.fp8_einsum(UP, zeros(X), zeros(W)),
        r"fp8_einsum: a is bfloat16 \[4, 3, 256\], need a QuantizedArray .* bf16_einsum",
    ),
    "no string": (
        lambda: jdg.bf16_einsum(("b",), zeros(X), zeros(W)),
        r"bf16_einsum: expr is \('b',\), need a string such as 'bhr,hdr->bhd'",
    ),
}


@pytest.mark.any_version
@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


def test_the_advice_of_fp8_works() -> None:
    """Down, and a weight gradient, with the operands that the errors ask for."""
    x, w, _ = draw(DOWN, {"b": 130, "h": 2, "d": 132, "r": 136})
    turned = jdg.quantize(jnp.swapaxes(w, 1, 2), BLOCKED)
    assert jdg.fp8_einsum("bhd,hrd->bhr", jdg.quantize(x), turned).shape == (130, 2, 136)
    rows = jdg.quantize(jnp.moveaxis(x, 0, -1))
    assert jdg.fp8_einsum("hdb,hrb->hdr", rows, rows).shape == (2, 132, 132)
    with pytest.raises(NotImplementedError, match=r"bf16_einsum, which has gradients"):
        jax.grad(lambda scales: _fp8_loss(scales, jdg.quantize(x), turned))(jdg.quantize(x).scales)


def _fp8_loss(scales: jax.Array, x: Any, w: Any) -> jax.Array:
    return jdg.fp8_einsum("bhd,hrd->bhr", (x.values, scales), w).astype(F32).sum()
