"""Shapes of dense GEMMs and of the linear layer, for `precompile` and the command line."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

from jax_deepgemm.jit.shapes import BLOCKS, DTYPES, Call, Shape, choice, flag, size


def matrix(fp8: bool, shape: tuple[int, ...], k_last: bool, block: tuple[int, int]) -> Any:
    """The type of an operand whose rows and k are its last two dimensions, stored k last or k first.

    Args:
      shape: [.., rows, k].
      block: of the scales, over rows and k.

    >>> matrix(True, (256, 512), False, (1, 128)).values.shape
    (512, 256)
    """
    import jax
    import jax.numpy as jnp

    from jax_deepgemm.quantization import quantize

    *leading, rows, k = shape
    stored = jax.ShapeDtypeStruct((*leading, rows, k) if k_last else (*leading, k, rows), jnp.bfloat16)
    if not fp8:
        return stored
    return jax.eval_shape(functools.partial(quantize, block=block if k_last else block[::-1]), stored)


@dataclass(frozen=True)
class DenseShape(Shape):
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
        import jax

        import jax_deepgemm

        fp8, form = self.op.startswith("fp8"), self.op[-2:]
        a = matrix(fp8, (self.m, self.k), form[0] == "n", (1, 128))
        b = matrix(fp8, (self.n, self.k), form[1] == "t", BLOCKS[self.b_block])
        c = jax.ShapeDtypeStruct((self.m, self.n), self.out_dtype) if self.accumulate else None
        function = functools.partial(
            getattr(jax_deepgemm, self.op), out_dtype=jax.numpy.dtype(self.out_dtype)
        )
        return [Call(self.op, function, (a, b, c), carry=2 if self.accumulate else None)]


SHAPES = (DenseShape,)
