"""Shapes of dense GEMMs and of the linear layer, for `precompile` and the command line."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jax_deepgemm.core.shapes import BLOCKS, DTYPES, WEIGHTS, Call, CallShape, choice, flag, layer_calls, size
from jax_deepgemm.ops.gemm import api
from jax_deepgemm.ops.gemm.linear import fp8_linear
from jax_deepgemm.ops.quantize.api import quantize


def matrix(fp8: bool, shape: tuple[int, ...], k_last: bool, block: tuple[int, int]) -> Any:
    """The type of an operand whose rows and k are its last two dimensions, stored k last or k first.

    Args:
      shape: [.., rows, k].
      block: of the scales, over rows and k.

    >>> matrix(True, (256, 512), False, (1, 128)).values.shape
    (512, 256)
    """
    *leading, rows, k = shape
    stored = jax.ShapeDtypeStruct((*leading, rows, k) if k_last else (*leading, k, rows), jnp.bfloat16)
    if not fp8:
        return stored
    return jax.eval_shape(functools.partial(quantize, block=block if k_last else block[::-1]), stored)


def weight(kind: str, shape: tuple[int, ...]) -> Any:
    """The type of a weight [.., n, k]: a master weight, or one quantised by blocks of 128x128 ("fp8").

    >>> weight("fp8", (4, 256, 512)).block, weight("float32", (256, 512)).dtype.name
    ((128, 128), 'float32')
    """
    return matrix(True, shape, True, (128, 128)) if kind == "fp8" else jax.ShapeDtypeStruct(shape, kind)


@dataclass(frozen=True)
class DenseShape(CallShape):
    """Dense GEMMs: D[m, n] = A[m, k] x B[k, n], with C if it accumulates."""

    OPS: ClassVar = tuple(
        f"{kind}_gemm_{form}" for kind in ("fp8", "bf16") for form in ("nt", "nn", "tn", "tt")
    )
    m: int = size("rows of A and D")
    n: int = size("columns of B and D")
    k: int = size("columns of A, rows of B")
    out_dtype: str = choice("of D", *DTYPES, default="bfloat16")
    accumulate: bool = flag("with C")
    b_block: str = choice("FP8: elements of B (n x k) per scale", *BLOCKS, default="128x128")

    def calls(self) -> list[Call]:
        fp8, form = self.op.startswith("fp8"), self.op[-2:]
        a = matrix(fp8, (self.m, self.k), form[0] == "n", (1, 128))
        b = matrix(fp8, (self.n, self.k), form[1] == "t", BLOCKS[self.b_block])
        c = jax.ShapeDtypeStruct((self.m, self.n), self.out_dtype) if self.accumulate else None
        function = functools.partial(getattr(api, self.op), out_dtype=jax.numpy.dtype(self.out_dtype))
        return [Call(self.op, function, (a, b, c), carry=2 if self.accumulate else None)]


@dataclass(frozen=True)
class LinearShape(CallShape):
    """A linear layer in FP8: y = x w^T, with the quantising and, by default, the gradients."""

    OPS: ClassVar = ("fp8_linear",)
    LAYER: ClassVar = True
    m: int = size("rows of x, all leading dimensions together")
    n: int = size("features of y")
    k: int = size("features of x")
    dtype: str = choice("of x", *DTYPES, default="bfloat16")
    out_dtype: str = choice("of y", *DTYPES, default="bfloat16")
    weights: str = choice("master weights, or quantised ones", *WEIGHTS, default="bfloat16")
    gradients: bool = flag("forward and backward too, not just forward", default=True)

    def calls(self) -> list[Call]:
        operands = (
            jax.ShapeDtypeStruct((self.m, self.k), self.dtype),
            weight(self.weights, (self.n, self.k)),
        )
        trained = (0,) if self.weights == "fp8" else (0, 1)
        forward = functools.partial(fp8_linear, out_dtype=self.out_dtype)
        return layer_calls(forward, operands, trained, self.gradients)


SHAPES = (DenseShape, LinearShape)
