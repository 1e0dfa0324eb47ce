"""Einsums as ops, one for each canonical form: shapes, sharding of every dimension, derivatives."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.ops.einsum import reference
from jax_deepgemm.ops.einsum.collapse import bf16_rows, fp8_rows, one_launch
from jax_deepgemm.ops.einsum.form import Form, Term, canonical, oriented
from jax_deepgemm.ops.gemm.checks import BLOCKED, Options, Quantized
from jax_deepgemm.ops.gemm.op import recut_blocks
from jax_deepgemm.ops.gemm.reference import SCALE_BLOCK

FP8_GRADIENT_HINT = (
    "Quantised operands have no useful derivative. Use jax_deepgemm.bf16_einsum, which has gradients, or "
    "jax.lax.stop_gradient."
)


def _name(kind: str, form: Form, add: bool) -> str:
    terms = ("".join(term) for term in (form.a, form.b, form.d))
    return "_".join([f"{kind}_einsum", *terms, *(["add"] if add else [])])


def _result(form: Form, b_at: int, *shapes: Any, out_dtype: Any, **_: Any) -> list[Any]:
    sizes = dict(zip(form.a, shapes[0], strict=True)) | dict(zip(form.b, shapes[b_at], strict=True))
    return [(tuple(sizes[name] for name in form.d), out_dtype)]


# bfloat16


@functools.cache
def bf16_op(form: Form, add: bool = False) -> Op:
    """The op of a canonical form; with `add` its last operand is added."""
    addend = f", {' '.join(form.d)}" if add else ""
    rule, arrow, result = form.rule.partition(" ->")
    return Op(
        _name("bf16", form, add),
        rule + addend + arrow + result,
        functools.partial(_result, form, 1),
        functools.partial(reference.bf16_einsum, form=form),
        reduces=form.summed,
        kernel=LazyKernel(
            "jax_deepgemm.ops.einsum.kernel",
            "bf16_einsum",
            batched=functools.partial(one_launch, form, (0, 1)),
            form=form,
        ),
        kernel_prepare=functools.partial(bf16_rows, form),
        aliases={2: 0} if add else {},
        addend=2 if add else None,
        base=bf16_op(form) if add else None,
        jvp=functools.partial(_jvp, form),
        transpose=functools.partial(_transpose, form),
    )


def bf16_einsum(form: Form, a: jax.Array, b: jax.Array, c: jax.Array | None, **params: Any) -> jax.Array:
    """The einsum of any form that is one product."""
    form, exchanged = oriented(form)
    pair = (b, a) if exchanged else (a, b)
    return bf16_op(canonical(form), c is not None)(*pair, *(() if c is None else (c,)), **params)[0]


def _jvp(form: Form, primals: list[Any], tangents: list[Any], **params: Any) -> list[jax.Array]:
    a, b, *_ = primals
    da, db, *dc = tangents
    run = functools.partial(bf16_op(form), **params)
    terms = [x for x in dc if x is not None]
    terms += [] if da is None else run(da, b)
    terms += [] if db is None else run(a, db)
    return [functools.reduce(jnp.add, terms)]


def _transpose(
    form: Form, index: int, cotangents: list[jax.Array], values: list[Any], **params: Any
) -> jax.Array:
    """The cotangent of an operand: the einsum of the result's and the other operand, as they are stored."""
    (dd,) = cotangents
    if index == 2:
        return dd
    wanted, other = values[index], values[1 - index]
    terms = (form.d, form.b, form.a) if index == 0 else (form.d, form.a, form.b)
    params |= {"out_dtype": wanted.dtype, "out_sharding": wanted.out_sharding, "config": None}
    return bf16_einsum(Form(*terms), dd.astype(wanted.dtype), other, None, **params)


# FP8


@functools.cache
def fp8_op(form: Form, per_row: bool, add: bool = False) -> Op:
    """The op of a canonical form; `per_row`: b has a scale for each of its rows and 128 of k."""

    def grid(term: Term, *blocked: str) -> str:
        return " ".join(f"{name}b" if name in blocked else name for name in term)

    scales_of_b = grid(form.b, "k") if per_row else grid(form.b, "n", "k")
    operands = (" ".join(form.a), grid(form.a, "k"), " ".join(form.b), scales_of_b)
    result = " ".join(form.d)
    blocks = {"kb": ("k", SCALE_BLOCK), **({} if per_row else {"nb": ("n", SCALE_BLOCK)})}
    return Op(
        _name("fp8_row" if per_row else "fp8", form, add),
        f"{', '.join((*operands, *((result,) if add else ())))} -> {result}",
        functools.partial(_result, form, 2),
        functools.partial(reference.fp8_einsum, form=form),
        reduces=form.summed,
        blocks=blocks,
        spmd=lambda plan, local, *arrays: (recut_blocks(plan, *arrays), None),
        kernel=LazyKernel(
            "jax_deepgemm.ops.einsum.kernel",
            "fp8_einsum",
            batched=functools.partial(one_launch, form, (0, 2)),
            form=form,
        ),
        kernel_prepare=functools.partial(fp8_rows, form),
        aliases={4: 0} if add else {},
        addend=4 if add else None,
        base=fp8_op(form, per_row) if add else None,
        grad_hint=FP8_GRADIENT_HINT,
    )


def fp8_einsum(form: Form, a: Quantized, b: Quantized, c: jax.Array | None, options: Options) -> jax.Array:
    """The einsum of an oriented form, both operands with k last."""
    op = fp8_op(canonical(form), b.block != BLOCKED, c is not None)
    arrays = (a.values, a.scales, b.values, b.scales, *(() if c is None else (c,)))
    return op(*arrays, **vars(options))[0]
