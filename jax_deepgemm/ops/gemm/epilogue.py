"""`Epilogue`: what a GEMM does with its float32 sums before it stores them, as users say it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.ops.gemm.checks import OUT_DTYPES, PER_ROW, Options, describe, is_array
from jax_deepgemm.ops.gemm.finish import Finish
from jax_deepgemm.ops.quantize.activation import GATES, Activation, as_activation
from jax_deepgemm.ops.quantize.api import quantize
from jax_deepgemm.ops.swiglu.reference import act

_GATED = {"swiglu": Activation("silu"), "geglu": Activation("gelu")}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["alpha", "bias"], meta_fields=["activation", "out_scales"]
)
@dataclass(frozen=True)
class Epilogue:
    """What a GEMM does with its sums in float32, before the one rounding of its result.

        D = activation(alpha * (A @ B) + bias) + C

    alpha and bias are arrays, traced and mapped like operands; the rest is static. Products and sums are in
    this order; alpha times a sum plus bias is one fused multiply-add on a GPU.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import Epilogue, bf16_gemm_nt
    >>> x, w = jnp.ones((4, 256), jnp.bfloat16), jnp.ones((16, 256), jnp.bfloat16)
    >>> bf16_gemm_nt(x, w, epilogue=Epilogue(alpha=0.5, bias=jnp.arange(16.0)))[0, :3]
    Array([128, 129, 130], dtype=bfloat16)
    >>> bf16_gemm_nt(x, w, epilogue=Epilogue(activation="swiglu")).shape
    (4, 8)

    Attributes:
      alpha: a number, or float32 [] or [1]; None: 1.
      bias: [n], bfloat16 or float32, for the columns of the product, and [g, n] for those of each group of a
        grouped one; None: 0.
      activation: of every number "silu", "gelu" (the tanh form) or "relu2"; of gate and up, so that D has
        n / 2 columns, "swiglu" or "geglu" (gate is the first half of the columns), or a
        `jax_deepgemm.activation.Activation`, as SwiGLU's functions take it: with `interleaved=True` gate and
        up take turns, which is what kernels compute before they store. Halves meet in a second pass, except
        in grouped products "nt" of bfloat16, or of FP8 with 128x128 scales and n / 2 a multiple of 128.
      out_scales: (1, 128): D is a QuantizedArray of this block, values float8_e4m3fn, bit for bit
        `quantize(D, (1, 128))` of D in float32; None: D is an array of out_dtype. Kernels store it so where
        D's columns are a multiple of 16 and gate and up, if there are any, do not take turns in FP8; else it
        is quantised in a pass of its own.

    Raises nothing; the functions that take one raise ValueError or TypeError.
    """

    alpha: Any = None
    bias: Any = None
    activation: str | Activation | None = None
    out_scales: tuple[int, int] | None = None


@dataclass(frozen=True)
class Checked:
    """An epilogue as ops take it."""

    finish: Finish
    rest: list[jax.Array]
    """alpha [1] and bias [n] in float32, as far as they are given."""
    halves: Activation | None
    """The activation of gate and up in halves, which follows the op."""
    quantized_after: bool = False
    """Whether the result is quantised in a pass of its own."""

    def run(
        self, product: Callable[[list[jax.Array], str, Finish, Options], Any], c: Any, options: Options
    ) -> Any:
        """D. Where gate and up lie in halves, a float32 product comes first, and the activation in a pass of
        its own.

        Args:
          product: (alpha, bias and C, name of the last one, what follows, options) -> D.
          c: or None.
          options: of D.
        """
        rest, last = ([*self.rest, c], "c") if c is not None else (self.rest, "")
        if self.halves is None and not self.quantized_after:
            return product(rest, last, self.finish, options)
        d = product(rest, last, self.finish, replace(options, out_dtype=np.dtype(np.float32)))
        d = d if self.halves is None else act(d, None, None, self.halves)
        return quantize(d, PER_ROW) if self.quantized_after else d.astype(options.out_dtype)


def check_epilogue(
    op: str, epilogue: Any, n: int, c: Any, groups: int = 0, *, apart: bool = False
) -> Checked:
    """The epilogue of a product of n columns, or of one for each of some groups.

    apart: whether kernels take gate and up in halves.
    """
    if not isinstance(epilogue, Epilogue):
        raise TypeError(
            f"{op}: epilogue is {epilogue!r}, need a jax_deepgemm.Epilogue or None. "
            "Write Epilogue(alpha=.., bias=.., activation=..)."
        )
    alpha, bias = _alpha(op, epilogue.alpha), _bias(op, epilogue.bias, (groups, n) if groups else (n,))
    activation, each = _activation(op, epilogue.activation)
    gated = activation is not None and not each
    if gated and n % 2:
        raise ValueError(
            f"{op}: the product has {n} columns, and {epilogue.activation!r} needs as many of gate as of up: "
            "an even number. Pad b."
        )
    if gated and c is not None:
        raise ValueError(
            f"{op}: c was given with the activation {epilogue.activation!r}, whose result has half of the "
            "product's columns. Add it to the result."
        )
    in_halves = activation is not None and gated and not activation.interleaved
    halves = activation if in_halves and not apart else None
    quantized = _out_scales(op, epilogue.out_scales, c)
    fits = (
        halves is None and (n // 2 if gated else n) % 16 == 0 and (in_halves or not (gated and "fp8" in op))
    )
    finish = Finish(
        alpha is not None,
        bias is not None,
        None if halves else activation,
        each,
        quantized=quantized and fits,
    )
    return Checked(finish, [x for x in (alpha, bias) if x is not None], halves, quantized and not fits)


def no_epilogue(op: str, epilogue: Any) -> None:
    """Raises:
    NotImplementedError: if there is one.
    """
    if epilogue is not None:
        raise NotImplementedError(
            f"{op}: epilogue was given with a weight in FP4, whose kernels have none. Apply it to the "
            "result with out_dtype=jnp.float32, in jax.numpy."
        )


def _out_scales(op: str, given: Any, c: Any) -> bool:
    if given is None:
        return False
    if given != PER_ROW:
        raise ValueError(
            f"{op}: out_scales is {given!r}, need {PER_ROW}, a scale for each row and 128 columns, or None. "
            "Other blocks: quantize(D, block) of the float32 result."
        )
    if c is not None:
        raise ValueError(
            f"{op}: c was given with out_scales={PER_ROW}, whose result is quantised as it is stored. Add c "
            "to the float32 result, and quantise the sum."
        )
    return True


def _alpha(op: str, alpha: Any) -> jax.Array | None:
    alpha = unwrapped(alpha)
    if alpha is None:
        return None
    number = isinstance(alpha, int | float | np.number) and not isinstance(alpha, bool)
    if not number and not (is_array(alpha) and alpha.shape in ((), (1,)) and alpha.dtype == np.float32):
        given = describe(alpha) if is_array(alpha) else repr(alpha)
        raise ValueError(
            f"{op}: alpha is {given}, need a number, float32 [] or float32 [1]. A factor for each row of a "
            "belongs to its scales, or to the result."
        )
    return jnp.asarray(alpha, jnp.float32).reshape(1)


def _bias(op: str, bias: Any, shape: tuple[int, ...]) -> jax.Array | None:
    bias = unwrapped(bias)
    if bias is None:
        return None
    if not is_array(bias) or tuple(bias.shape) != shape or np.dtype(bias.dtype) not in OUT_DTYPES:
        given = describe(bias) if is_array(bias) else repr(bias)
        way_out = "What differs by row is c." if len(shape) == 1 else "One bias for all: jnp.broadcast_to it."
        raise ValueError(
            f"{op}: bias is {given}, need bfloat16 or float32 {list(shape)}, a number for each column of the "
            f"product{'' if len(shape) == 1 else ' of each group'}, or None. {way_out}"
        )
    return jnp.asarray(bias).astype(jnp.float32)


def _activation(op: str, given: Any) -> tuple[Activation | None, bool]:
    """The activation, and whether it is of every number."""
    if given is None:
        return None, False
    if isinstance(given, str) and given in GATES:
        return Activation(given), True
    if isinstance(given, str) and given in _GATED:
        return _GATED[given], False
    if not isinstance(given, Activation):
        known = ", ".join(map(repr, (*GATES, *_GATED)))
        raise ValueError(
            f"{op}: activation is {given!r}, need {known}, None, or a jax_deepgemm.activation.Activation."
        )
    activation = as_activation(op, given)
    return activation, not activation.gated
