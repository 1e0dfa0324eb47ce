"""Dense layers: a product, what stands in front of it and behind it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.first_order import ReverseOnly
from jax_deepgemm.inference import checks
from jax_deepgemm.inference.elementwise import activated
from jax_deepgemm.inference.norms import normed_fp8, normed_sum, summed
from jax_deepgemm.inference.products import product
from jax_deepgemm.inference.weights import QuantizedWeight, dequantize, per_channel
from jax_deepgemm.log import note_once
from jax_deepgemm.ops.gemm.api import fp8_gemm_nt
from jax_deepgemm.ops.gemm.linear import fp8_linear
from jax_deepgemm.ops.gemm.tokens import Tokens
from jax_deepgemm.ops.grouped.linear import grouped_linear as grouped
from jax_deepgemm.ops.quantize import QuantizedArray
from jax_deepgemm.ops.quantize.per_channel import PerChannelArray, dequantize_per_channel

LAYOUTS = ("kn", "nk")
Weight: TypeAlias = ArrayLike | QuantizedWeight | PerChannelArray | QuantizedArray
_STEP_K, _STEP_N = 8, 16
"""Rows of tokens and of weights in whole 16 bytes, as the kernel for scales a channel reads them."""


def linear(
    x: ArrayLike,
    w: Weight,
    bias: ArrayLike | None = None,
    act: str | None = None,
    *,
    w_layout: str = "kn",
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """act(x @ w + bias), with a weight in 16 bits, float32, FP8, int8, int4 or FP6.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm.inference import quantize
    >>> x, w = jnp.ones((3, 32), jnp.bfloat16), jnp.full((32, 16), 0.5, jnp.bfloat16)
    >>> linear(x, w, jnp.full(16, -20.0), "relu")[0, 0].item(), linear(x, w.T, w_layout="nk")[0, 0].item()
    (0.0, 16.0)
    >>> [round(linear(x, quantize(w, kind))[0, 0].item()) for kind in ("int8", "int4", "fp6_e3m2")]
    [16, 14, 16]

    What runs is decided by the weight:

        array of the dtype of x           XLA's product, cuBLAS on a GPU
        QuantizedArray [n, k], FP8        x is quantised too, one scale for a row and 128 features; then as
                                          `jax_deepgemm.fp8_gemm_nt`. x is bfloat16 or float32
        int8 with a scale a channel, or   for bfloat16 x, k a multiple of 8 and n of 16: the kernel that reads
        a PerChannelArray                 the bytes as they are stored; nothing is quantised or dequantised
        any other weight, or x            the whole weight is dequantised to the dtype of x at each call, then
                                          XLA's product: that saves memory, not time

    Args:
      x: [.., k] bfloat16, float16 or float32.
      w: [k, n] (see w_layout): an array, a `QuantizedWeight`, a `PerChannelArray`, or a `QuantizedArray` of
        FP8.
      bias: [n], or None.
      act: as in `bias_act`, or None.
      w_layout: "kn", or "nk" for w stored [n, k]: arrays, without a copy, and FP8, whose only layout it is.
      out_dtype: bfloat16, float16 or float32; default that of x.

    Returns:
      [.., n] in out_dtype; products are summed in float32, bias and activation computed in float32 and
      rounded once.

    Raises:
      TypeError, ValueError: types, shapes and layouts that do not fit.

    Differentiable with respect to x and, where it is an array, w; int8, int4 and FP6 are for inference.
    """
    op = "linear"
    given = checks.floats(op, "x", x)
    dtype = result_dtype(op, given, out_dtype)
    y = multiplied(op, given, w, "w", w_layout, as_it_goes_on(dtype, bias, act))
    return finished(op, y, bias, act, dtype)


def finished(
    op: str, wide: jax.Array, bias: Any, act: Any, dtype: Any, gated: Any = None, gate_first: bool = False
) -> Any:
    """What follows a product, and one rounding."""
    if bias is not None:
        wide = wide + checks.row(op, "bias", bias, wide.shape[-1], wide.ndim)
    if act is not None or gated is not None:
        wide = activated(op, wide, "identity" if act is None else act, gated, gate_first)
    return wide.astype(dtype)


def result_dtype(op: str, x: jax.Array, out_dtype: Any) -> Any:
    """That of x, or what the caller asks for."""
    dtype = x.dtype if out_dtype is None else np.dtype(out_dtype)
    if dtype not in checks.FLOATS:
        raise TypeError(f"{op}: out_dtype is {dtype.name}, need bfloat16, float16 or float32.")
    return dtype


def as_it_goes_on(dtype: Any, *then: Any) -> Any:
    """The type of a product: float32 if something follows, so that there is one rounding."""
    return np.dtype(dtype) if all(one is None for one in then) else np.dtype(np.float32)


def of_kernels(dtype: Any) -> Any:
    """The type that kernels give where another is wanted."""
    return jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32


def multiplied(op: str, x: jax.Array, w: Any, name: str, layout: str, dtype: Any) -> jax.Array:
    """[.., n] of x [.., k] and a weight of any kind, in a type or, by kernels, in float32."""
    w = unwrapped(w)
    frozen = is_frozen(op, w, name, layout)
    weight = w if frozen else checks.floats(op, name, w, like=x)
    k = weight.shape[-1 if layout == "nk" else -2] if len(weight.shape) == 2 else -1
    if x.ndim < 1 or k != x.shape[-1]:
        stored = "[n, k]" if layout == "nk" else "[k, n]"
        other = "kn" if layout == "nk" else "nk"
        raise ValueError(
            f"{op}: x is {list(x.shape)} and {name} is {list(weight.shape)}, need x [.., k] and {name} "
            f"{stored} of the same k. For an array stored the other way pass w_layout={other!r}."
        )
    if isinstance(weight, QuantizedArray):
        no_float16(op, x, name)
        return fp8_linear(x, weight, out_dtype=of_kernels(dtype))
    if frozen:
        return _frozen(op, x, weight, name, dtype)
    return product(x, weight, ((x.ndim - 1,), (layout.index("k"),)), out_dtype=dtype)


def _frozen(op: str, x: jax.Array, w: Any, name: str, dtype: Any) -> jax.Array:
    k, n = w.shape
    direct = as_stored(op, x, w, name)
    if direct is not None:
        rows = math.prod(x.shape[:-1])
        stacked = PerChannelArray(*(jnp.expand_dims(unwrapped(part), 0) for part in direct))
        sizes = jnp.full(1, rows, jnp.int32)
        options: dict[str, Any] = {"recipe": "bf16", "weight_layout": "kn", "out_dtype": of_kernels(dtype)}
        y = grouped(x.reshape(rows, k), stacked, sizes, **options)
        return y.reshape(*x.shape[:-1], n)
    return product(x, dequantized(op, x, w, name), ((x.ndim - 1,), (0,)), out_dtype=dtype)


def is_frozen(op: str, w: Any, name: str, layout: str) -> bool:
    """Whether a weight is quantised; it has one layout then."""
    checks.choice(op, "w_layout", layout, LAYOUTS)
    frozen = isinstance(w, QuantizedWeight | PerChannelArray | QuantizedArray)
    own = "nk" if isinstance(w, QuantizedArray) else "kn"
    if frozen and layout != own:
        raise ValueError(
            f"{op}: {name} is a {type(w).__name__} and w_layout is {layout!r}, need {own!r}: its only layout."
        )
    return frozen


def no_float16(op: str, x: jax.Array, name: str) -> None:
    """Refuses what FP8 products do not take."""
    if x.dtype == np.float16:
        raise TypeError(
            f"{op}: x is float16 and {name} is FP8, need bfloat16 or float32: x.astype(jnp.bfloat16)."
        )


def as_stored(op: str, x: jax.Array, w: Any, name: str) -> PerChannelArray | None:
    """A weight whose bytes the kernel for scales a channel reads; None of any other."""
    direct = per_channel(op, name, w) if isinstance(w, QuantizedWeight) else w
    *_, k, n = w.shape
    return direct if x.dtype == jnp.bfloat16 and k % _STEP_K == n % _STEP_N == 0 else None


def dequantized(op: str, x: jax.Array, w: QuantizedWeight | PerChannelArray, name: str) -> jax.Array:
    """A whole weight in the dtype of x, which the log mentions."""
    kind = w.format if isinstance(w, QuantizedWeight) else np.dtype(w.values.dtype).name
    note_once(
        f"{op}: {name}, {kind} {list(w.shape)}, is dequantised to {x.dtype.name} at each call: that saves "
        "memory, not time. The docstring of linear says which weights are read as they are stored."
    )
    return dequantize(w, x.dtype) if isinstance(w, QuantizedWeight) else dequantize_per_channel(w, x.dtype)


def norm_linear(
    x: ArrayLike,
    w: Weight,
    bias: ArrayLike | None = None,
    act: str | None = None,
    *,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    kind: str = "layer",
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    residual_bias: ArrayLike | None = None,
    w_layout: str = "kn",
    out_dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`norm`, then `linear`: (act(z @ w + bias), z) with z = norm(x + residual + residual_bias).

    >>> import jax.numpy as jnp
    >>> y, z = norm_linear(jnp.array([[1.0, 3.0]]), jnp.array([[2.0], [5.0]]), eps=0.0)
    >>> y.tolist(), z.tolist()
    ([[3.0]], [[-1.0, 1.0]])

    Args:
      x: [.., k] bfloat16, float16 or float32.
      w: [k, n], any weight of `linear`.
      bias: [n], or None.
      act: as in `bias_act`, or None.
      gamma, beta: [k], or None; of the norm.
      kind, eps: as in `norm`.
      residual: [.., k], added before the norm, or None.
      residual_bias: [k], added before the norm, or None.
      w_layout, out_dtype: as in `linear`.

    Returns:
      ([.., n] in out_dtype, [.., k] in the dtype of x).

    Raises:
      TypeError, ValueError: as `norm` and `linear`.

    The same numbers as the two calls. Differentiable as they are.
    """
    op = "norm_linear"
    dtype = result_dtype(op, checks.floats(op, "x", x), out_dtype)
    form = _Normed(op, "w", kind, float(eps), w_layout, as_it_goes_on(dtype, bias, act), "normed")
    y, z = _norm_product(form, (x, residual, residual_bias, gamma, beta), w)
    return finished(op, y, bias, act, dtype), z


@dataclass(frozen=True)
class _Normed:
    """What of a product of a norm z is static; `returns` is mlp's."""

    op: str
    name: str
    kind: str
    eps: float
    layout: str
    dtype: Any
    returns: str

    def apart(self, parts: Any, w: Any) -> tuple[jax.Array, jax.Array]:
        """(z @ w, z or the sum), as `norm` and `linear` compute it."""
        both = self.returns == "sum"
        z, s = normed_sum(self.op, parts, self.kind, self.eps, both=both)
        return multiplied(self.op, z, w, self.name, self.layout, self.dtype), s if both else z


def _norm_product(form: _Normed, parts: Any, w: Any) -> tuple[jax.Array, jax.Array]:
    """(z @ w, z or the sum); where an FP8 weight wants z in FP8, the norm's kernel makes that."""
    w = unwrapped(w)
    if not isinstance(w, QuantizedArray) or np.ndim(unwrapped(parts[0])) < 2:
        return form.apart(parts, w)
    jax.eval_shape(form.apart, parts, w)  # the checks of both
    leaves, tree = jax.tree.flatten((jax.tree.map(jnp.asarray, parts), w))
    y, other = _fp8_product(form, *jax.tree.unflatten(tree, same_varying_axes(leaves)))
    return y, other


@functools.partial(
    ReverseOnly, "a norm and its FP8 product", "norm and bf16_gemm_nt, which have derivatives of any order"
)
def _fp8_product(form: _Normed, parts: Any, w: QuantizedArray) -> tuple[jax.Array, jax.Array]:
    q, other = normed_fp8(form.op, parts, form.kind, form.eps, returns=form.returns)
    tokens = Tokens.of(q.values)
    rows = QuantizedArray(tokens.flatten(q.values), tokens.flatten(q.scales), q.block)
    return tokens.unflatten(fp8_gemm_nt(rows, w, out_dtype=of_kernels(form.dtype))), other


def _fp8_product_fwd(form: _Normed, parts: Any, w: QuantizedArray) -> Any:
    return _fp8_product(form, parts, w), (parts, w)


def _fp8_product_bwd(form: _Normed, kept: Any, cotangents: Any) -> Any:
    """The gradients of the two calls, whose forward pass is not run again: nothing reads its product."""
    parts, w = kept
    _, pull = jax.vjp(lambda parts: form.apart(parts, w), parts)
    return *pull(cotangents), None


_fp8_product.defvjp(_fp8_product_fwd, _fp8_product_bwd)


def mlp(
    x: ArrayLike,
    w1: Weight,
    w2: Weight,
    b1: ArrayLike | None = None,
    b2: ArrayLike | None = None,
    act: str = "gelu_tanh",
    *,
    gated: str | None = None,
    gate_first: bool = False,
    norm: str | None = None,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    residual_bias: ArrayLike | None = None,
    returns: str = "normed",
    w_layout: str = "kn",
) -> tuple[jax.Array, jax.Array]:
    """An MLP, with the norm in front of it: act(z @ w1 + b1) @ w2 + b2, where z = norm(s), s = x + residual +
    residual_bias.

    >>> import jax.numpy as jnp
    >>> x, w1, w2 = jnp.array([[1.0, 3.0]]), jnp.array([[1.0, -1.0], [1.0, 1.0]]), jnp.array([[1.0], [10.0]])
    >>> y, z = mlp(x, w1, w2, act="relu")                          # relu([4, 2])
    >>> y.tolist(), z.tolist()
    ([[24.0]], [[1.0, 3.0]])
    >>> y, s = mlp(x, w1, w2, act="relu", norm="layer", eps=0.0, residual=x, returns="sum")
    >>> y.tolist(), s.tolist()                                     # relu([0, 2]) of the norm [-1, 1]
    ([[20.0]], [[2.0, 6.0]])

    GPT-J's parallel block, whose MLP reads the residual alone, is the same with the residual as x.

    Args:
      x: [.., k] bfloat16, float16 or float32.
      w1: [k, n], any weight of `linear`; [k, 2 n] where it is gated.
      w2: [n, m], any weight of `linear`.
      b1: [n], or [2 n], or None.
      b2: [m], or None.
      act, gated, gate_first: as in `bias_act`.
      norm: None, "layer" or "rms".
      gamma, beta: [k], or None; of the norm.
      eps: of the norm.
      residual: [.., k], or None.
      residual_bias: [k], or None.
      returns: which is the second result: "normed", z, or "sum", s, the residual that goes on.
      w_layout: of both weights, as in `linear`.

    Returns:
      ([.., m], [.., k]) in the dtype of x. What is between the products is rounded once, to the dtype of x.

    Raises:
      TypeError, ValueError: as `norm` and `linear`.

    Differentiable as these are.
    """
    op = "mlp"
    checks.choice(op, "returns", returns, ("normed", "sum"))
    if norm is None and (gamma is not None or beta is not None):
        raise ValueError(f"{op}: gamma or beta is given and norm is None, need norm='layer' or 'rms'.")
    wide = np.dtype(np.float32)
    if norm is None:
        other = summed(op, x, residual, residual_bias)
        inner = multiplied(op, other, w1, "w1", w_layout, wide)
    else:
        checks.choice(op, "norm", norm, ("layer", "rms"))
        form = _Normed(op, "w1", norm, float(eps), w_layout, wide, returns)
        inner, other = _norm_product(form, (x, residual, residual_bias, gamma, beta), w1)
    inner = finished(op, inner, b1, act, other.dtype, gated, gate_first)
    y = multiplied(op, inner, w2, "w2", w_layout, as_it_goes_on(other.dtype, b2))
    y = finished(op, y, b2, None, other.dtype)
    return y, other
