"""Layer norm and RMS norm of rows, also of sums of a row, its residual and a bias; in FP8, too."""

from __future__ import annotations

from typing import Any, Literal, overload

import jax
from jax.typing import ArrayLike

from jax_deepgemm.inference import checks
from jax_deepgemm.ops.norm import norm_rows, reference
from jax_deepgemm.ops.norm.problem import SCALE_FORMATS
from jax_deepgemm.ops.norm.reference import KINDS
from jax_deepgemm.ops.quantize import QuantizedArray


@overload
def norm(
    x: ArrayLike,
    gamma: ArrayLike | None = ...,
    beta: ArrayLike | None = ...,
    *,
    kind: str = ...,
    eps: float = ...,
    residual: ArrayLike | None = ...,
    bias: ArrayLike | None = ...,
    return_sum: Literal[False] = ...,
) -> jax.Array: ...


@overload
def norm(
    x: ArrayLike,
    gamma: ArrayLike | None = ...,
    beta: ArrayLike | None = ...,
    *,
    kind: str = ...,
    eps: float = ...,
    residual: ArrayLike | None = ...,
    bias: ArrayLike | None = ...,
    return_sum: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    kind: str = "layer",
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    return_sum: bool = False,
) -> Any:
    """A norm of each row of s = x + residual + bias.

        layer   (s - mean(s)) / sqrt(var(s) + eps) * gamma + beta        var: mean of (s - mean(s))^2
        rms     s / sqrt(mean(s^2) + eps) * gamma + beta

    >>> import jax.numpy as jnp
    >>> norm(jnp.array([[1.0, 3.0]]), eps=0.0).tolist()
    [[-1.0, 1.0]]
    >>> y, s = norm(jnp.array([[3.0, 3.0]]), kind="rms", eps=0.0, residual=jnp.ones((1, 2)), return_sum=True)
    >>> y.tolist(), s.tolist()
    ([[1.0, 1.0]], [[4.0, 4.0]])

    Args:
      x: [.., h] bfloat16, float16 or float32, with h > 0.
      gamma, beta: [h] of any of these types, or None.
      kind: "layer" or "rms".
      eps: added to the variance, or the mean of squares.
      residual: [.., h] in the dtype of x, or None.
      bias: [h], or None.
      return_sum: also return s.

    Returns:
      [.., h] in the dtype of x; or (that, s). s is the sum in float32, rounded once to the dtype of x, and
      what is normalised is that rounded s. Everything is computed in float32, the variance from differences,
      so that a mean much larger than they are does not drown it.

    Raises:
      TypeError, ValueError: types and shapes that do not fit.

    Differentiable. Source: Ba et al., arXiv:1607.06450; Zhang and Sennrich, arXiv:1910.07467.
    """
    both = bool(return_sum)
    y, s = normed_sum("norm", (x, residual, bias, gamma, beta), kind, eps, both=both)
    return (y, s) if both else y


@overload
def norm_fp8(
    x: ArrayLike,
    gamma: ArrayLike | None = ...,
    beta: ArrayLike | None = ...,
    *,
    kind: str = ...,
    eps: float = ...,
    residual: ArrayLike | None = ...,
    bias: ArrayLike | None = ...,
    scale_format: str = ...,
    return_sum: Literal[False] = ...,
) -> QuantizedArray: ...


@overload
def norm_fp8(
    x: ArrayLike,
    gamma: ArrayLike | None = ...,
    beta: ArrayLike | None = ...,
    *,
    kind: str = ...,
    eps: float = ...,
    residual: ArrayLike | None = ...,
    bias: ArrayLike | None = ...,
    scale_format: str = ...,
    return_sum: Literal[True],
) -> tuple[QuantizedArray, jax.Array]: ...


def norm_fp8(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    kind: str = "layer",
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    scale_format: str = "f32",
    return_sum: bool = False,
) -> Any:
    """`norm` in FP8, as `fp8_gemm_nt` reads it: the bits of `quantize` of the norm, in one pass.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import fp8_gemm_nt, quantize
    >>> from jax_deepgemm.inference import norm_fp8
    >>> x, w = jax.random.normal(jax.random.key(0), (2, 64, 256), jnp.bfloat16)
    >>> q, s = norm_fp8(x, kind="rms", residual=x, return_sum=True)
    >>> q.values.dtype.name, q.scales.shape, s.shape
    ('float8_e4m3fn', (64, 2), (64, 256))
    >>> fp8_gemm_nt(q, quantize(w, (128, 128))).shape
    (64, 64)

    Args:
      x: [.., rows, h] bfloat16, float16 or float32, with h > 0.
      gamma, beta, kind, eps, residual, bias: as in `norm`.
      scale_format: "f32", or "ue8m0" for scales that are powers of two.
      return_sum: also return s = x + residual + bias.

    Returns:
      QuantizedArray [.., rows, h] of float8_e4m3fn, one scale for 128 features of a row; or (that, s). The
      norm is rounded to the dtype of x before, as `norm` returns it.

    Raises:
      TypeError, ValueError: types and shapes that do not fit.

    Has no derivative: to train, `fp8_linear` of `norm`. On a mesh rows are cut freely.
    """
    op = "norm_fp8"
    if scale_format not in SCALE_FORMATS:
        raise ValueError(
            f"{op}: scale_format is {scale_format!r}, need 'f32' (any float32) or 'ue8m0' (powers of two)."
        )
    given = _operands(op, (x, residual, bias, gamma, beta), kind)
    if given[0].ndim < 2:
        raise ValueError(
            f"{op}: x is {list(given[0].shape)}, need [.., rows, h]. For a row: norm_fp8(x[None])."
        )
    form = {"normed": False, "scales": scale_format, "summed": bool(return_sum)}
    values, scales, *total = _rows(*given, kind=kind, eps=eps, **form)
    q = QuantizedArray(values, scales, (1, 128))
    return (q, *total) if return_sum else q


def normed_sum(
    op: str, parts: tuple[Any, ...], kind: Any, eps: Any, *, both: bool
) -> tuple[jax.Array, jax.Array]:
    """The norm, and s, of parts (x, residual, bias, gamma, beta): s = x + residual + bias.

    A kernel computes both where a program needs them and they differ: XLA adds and normalises in turn. Alone
    each is XLA's, which fuses it with its neighbours.
    """
    given = _operands(op, parts, kind)
    if both and not (parts[1] is None and parts[2] is None):
        y, s = _rows(*given, kind=kind, eps=eps, summed=True)
        return y, s
    s = reference.total(*given[:3])
    return reference.normed(s, *given[3:], kind=kind, eps=eps), s


def normed_fp8(
    op: str, parts: tuple[Any, ...], kind: Any, eps: Any, *, returns: str
) -> tuple[QuantizedArray, jax.Array]:
    """The norm in FP8, and the norm ("normed") or s ("sum"), of parts as in `normed_sum`."""
    given = _operands(op, parts, kind)
    form = {"normed": returns == "normed", "summed": returns == "sum", "scales": SCALE_FORMATS[0]}
    found = _rows(*given, kind=kind, eps=eps, **form)
    values, scales = found[-2:] if returns == "normed" else found[:2]
    return QuantizedArray(values, scales, (1, 128)), found[0 if returns == "normed" else -1]


def summed(op: str, x: Any, residual: Any, bias: Any) -> jax.Array:
    """x + residual + bias, rounded once to the dtype of x."""
    return reference.total(*_operands(op, (x, residual, bias, None, None), KINDS[0])[:3])


def _operands(op: str, parts: tuple[Any, ...], kind: Any) -> tuple[Any, ...]:
    """x, residual, bias, gamma and beta, checked."""
    x, residual, bias, gamma, beta = parts
    given = checks.floats(op, "x", x)
    if given.ndim < 1 or given.shape[-1] < 1:
        raise ValueError(f"{op}: x is {list(given.shape)}, need [.., h] with h > 0.")
    checks.choice(op, "kind", kind, KINDS)
    if residual is not None:
        other = checks.floats(op, "residual", residual, like=given)
        residual = checks.shaped(op, "residual", other, given.shape, "as x")
    vectors = {"bias": bias, "gamma": gamma, "beta": beta}
    found = (
        one if one is None else checks.vector(op, name, one, given.shape[-1]) for name, one in vectors.items()
    )
    return given, residual, *found


def _rows(x: Any, residual: Any, *vectors: Any, **form: Any) -> list[jax.Array]:
    bias, gamma, beta = vectors
    return norm_rows(x, residual, (bias, gamma, beta), **form)
