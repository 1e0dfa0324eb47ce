"""Shapes of einsums, for `precompile` and the command line."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jax_deepgemm.core.shapes import DTYPES, Call, CallShape, choice, flag, size
from jax_deepgemm.ops.einsum import api
from jax_deepgemm.ops.einsum.form import Form, Term, parse
from jax_deepgemm.ops.quantize.api import quantize

EXPRESSIONS = ("bhr,hdr->bhd", "bhd,hdr->bhr", "bmk,bnk->mn", "hmk,hnk->hmn")


def shape_of(form: Form, term: Term, batch: int, m: int, n: int, k: int) -> tuple[int, ...]:
    """The shape of a term whose every class is one letter.

    >>> form = parse("bhr,hdr->bhd")
    >>> shape_of(form, form.a, 2, 3, 4, 5)
    (3, 2, 5)
    """
    sizes = {"h": batch, "r": batch, "m": m, "n": n, "k": k}
    return tuple(sizes[form.classes[name]] for name in term)


@dataclass(frozen=True)
class EinsumShape(CallShape):
    """Einsums: a batch of D[m, n] = A[m, k] x B[n, k], or the sum of one, with C if it accumulates."""

    OPS: ClassVar = ("bf16_einsum", "fp8_einsum")
    batch: int = size("heads, or products that are added up")
    m: int = size("rows of D, of one head")
    n: int = size("columns of D, of one head")
    k: int = size("what is summed over, of one head")
    expr: str = choice("how they are stored", *EXPRESSIONS, default=EXPRESSIONS[0])
    out_dtype: str = choice("of D", *DTYPES, default="bfloat16")
    accumulate: bool = flag("with C")

    def calls(self) -> list[Call]:
        form = parse(self.expr)
        sizes = (self.batch, self.m, self.n, self.k)
        stored = (jax.ShapeDtypeStruct(shape_of(form, x, *sizes), jnp.bfloat16) for x in (form.a, form.b))
        operands: list[Any] = list(stored)
        if self.op.startswith("fp8"):
            blocks = ((1, 128), (128, 128))
            operands = [
                jax.eval_shape(functools.partial(quantize, block=block), x)
                for x, block in zip(operands, blocks, strict=True)
            ]
        if self.accumulate:
            operands.append(jax.ShapeDtypeStruct(shape_of(form, form.d, *sizes), self.out_dtype))
        function = functools.partial(getattr(api, self.op), self.expr, out_dtype=jnp.dtype(self.out_dtype))
        return [Call(self.op, function, tuple(operands), carry=2 if self.accumulate else None)]


SHAPES = (EinsumShape,)
