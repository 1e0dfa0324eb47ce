"""Shapes of dense GEMMs and of the linear layer, for `precompile` and the command line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jax_deepgemm.core.shapes import BLOCKS, DTYPES, WEIGHTS, Call, CallShape, choice, flag, layer_calls, size
from jax_deepgemm.ops.gemm import api
from jax_deepgemm.ops.gemm.checks import PER_ROW
from jax_deepgemm.ops.gemm.epilogue import Epilogue
from jax_deepgemm.ops.gemm.linear import fp8_linear
from jax_deepgemm.ops.quantize import nvfp4_slabs
from jax_deepgemm.ops.quantize.activation import Activation
from jax_deepgemm.ops.quantize.api import quantize
from jax_deepgemm.ops.quantize.prepared_fp4 import BFLOAT16, E4M3, PreparedFp4
from jax_deepgemm.ops.quantize.slabs import BYTES, COLUMNS, ROWS

FROZEN_WEIGHTS = ("fp8", "fp4", "nvfp4")
_SLABS = {"fp4": BYTES, "nvfp4": nvfp4_slabs.BYTES}
ACTIVATIONS: dict[str, str | Activation | None] = {
    "none": None,
    **{name: name for name in ("silu", "gelu", "relu2", "swiglu", "geglu")},
    "swiglu_pairs": Activation(interleaved=True),
    "geglu_pairs": Activation("gelu", interleaved=True),
}
"""Of epilogues; of pairs: gate and up take turns."""


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
    """The type of a weight [.., n, k]: a master weight, one quantised by blocks of 128x128 ("fp8"), or a
    PreparedFp4 ("fp4", of MXFP4, or "nvfp4").

    >>> weight("fp8", (4, 256, 512)).block, weight("float32", (256, 512)).dtype.name
    ((128, 128), 'float32')
    >>> weight("fp4", (4, 256, 512))
    PreparedFp4(float4_e2m1fn[4,256,512] for float8_e4m3fn)
    """
    if kind in _SLABS:
        *lead, n, k = shape
        slabs: Any = jax.ShapeDtypeStruct((*lead, n // ROWS, -(-k // COLUMNS), _SLABS[kind]), jnp.uint8)
        return PreparedFp4(slabs, BFLOAT16 if kind == "nvfp4" else E4M3)
    return matrix(True, shape, True, (128, 128)) if kind == "fp8" else jax.ShapeDtypeStruct(shape, kind)


def a_block(b_block: str) -> tuple[int, int]:
    """What shares a scale of A beside such a B."""
    return (1, BLOCKS[b_block][1])


def operand_b(op: str, weights: str, shape: tuple[int, ...], b_block: str) -> Any:
    """The type of B [.., n, k] of a product, as its name says it is stored."""
    form = next(part for part in op.split("_") if part in ("nt", "nn", "tn", "tt"))
    if weights in _SLABS:
        return weight(weights, shape)
    return matrix("fp8" in op, shape, form[1] == "t", BLOCKS[b_block])


def check_fp4(weights: str, *rows: int, refused: str = "") -> None:
    """Raises:
    ValueError: FP4 weights whose rows are no multiples of 64, or where there are none.
    """
    if weights in _SLABS and refused:
        raise ValueError(f"weights is {weights!r}, need {refused}, or weights fp8")
    if weights in _SLABS and any(n % ROWS for n in rows):
        shown = " and ".join(map(str, rows))
        raise ValueError(f"weights is {weights!r} of {shown} rows, need multiples of {ROWS}")


def instead_of(op: str, weights: str) -> str:
    """What takes such weights if this product does not.

    >>> [instead_of(op, "nvfp4") for op in ("bf16_gemm_nt", "fp8_gemm_nt", "bf16_gemm_nn")]
    ['', 'a product in bf16', 'a product nt']
    """
    if "_nt" not in op:
        return "a product nt"
    return "a product in bf16" if weights == "nvfp4" and "fp8" in op else ""


def _has_epilogue(shape: Any) -> bool:
    return shape.activation != "none" or shape.bias or shape.quantised


def check_ends(shape: Any) -> None:
    """Raises:
    ValueError: an epilogue of a product with FP4 weights.
    """
    if shape.weights in _SLABS and _has_epilogue(shape):
        raise ValueError(f"weights is {shape.weights!r}, whose products have no epilogue: need weights fp8")


def with_epilogue(
    product: Callable[..., Any], shape: Any, bias_shape: tuple[int, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A product that ends as `activation`, `bias` and `quantised` of a shape say, and the bias, its last
    operand, if it has one."""
    how = ACTIVATIONS[shape.activation]
    if not _has_epilogue(shape):
        return product, ()

    def run(*operands: Any) -> Any:
        given, bias = (operands[:-1], operands[-1]) if shape.bias else (operands, None)
        return product(*given, epilogue=Epilogue(None, bias, how, PER_ROW if shape.quantised else None))

    return run, (jax.ShapeDtypeStruct(bias_shape, jnp.float32),) if shape.bias else ()


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
    weights: str = choice("types of a quantised B", *FROZEN_WEIGHTS, default="fp8")
    activation: str = choice("epilogue", *ACTIVATIONS, default="none")
    bias: bool = flag("epilogue: with a bias")
    quantised: bool = flag("epilogue: D in FP8 with 1x128 scales")

    def __post_init__(self) -> None:
        need = "a product without C" if self.accumulate else instead_of(self.op, self.weights)
        check_fp4(self.weights, self.n, refused=need)
        check_ends(self)

    def calls(self) -> list[Call]:
        fp8, form = self.op.startswith("fp8"), self.op[-2:]
        a = matrix(fp8, (self.m, self.k), form[0] == "n", a_block(self.b_block))
        b = operand_b(self.op, self.weights, (self.n, self.k), self.b_block)
        c = jax.ShapeDtypeStruct((self.m, self.n), self.out_dtype) if self.accumulate else None
        product = functools.partial(getattr(api, self.op), out_dtype=jax.numpy.dtype(self.out_dtype))
        function, bias = with_epilogue(product, self, (self.n,))
        return [Call(self.op, function, (a, b, c, *bias), carry=2 if self.accumulate else None)]


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
    weights: str = choice("master weights, or quantised ones", *WEIGHTS, "fp4", default="bfloat16")
    gradients: bool = flag("forward and backward too, not just forward", default=True)

    def __post_init__(self) -> None:
        check_fp4(self.weights, self.n)

    def calls(self) -> list[Call]:
        operands = (
            jax.ShapeDtypeStruct((self.m, self.k), self.dtype),
            weight(self.weights, (self.n, self.k)),
        )
        trained = (0,) if self.weights in FROZEN_WEIGHTS else (0, 1)
        forward = functools.partial(fp8_linear, out_dtype=self.out_dtype)
        return layer_calls(forward, operands, trained, self.gradients)


SHAPES = (DenseShape, LinearShape)
