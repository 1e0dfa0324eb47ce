"""Norms as ops: one for each combination of operands and results. Rows are cut freely, a row is whole.

x [r, h][, residual [r, h]][, bias, gamma, beta [h]] -> [norm [r, h]][, values [r, h], scales [r, hb]][, sum]
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.declaration import Dims
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.ops.norm import reference
from jax_deepgemm.ops.norm.problem import MOST_FEATURES, TILE, NormForm
from jax_deepgemm.ops.quantize import quantize

_HINT = "norm, without FP8, has derivatives of any order."


def norm_rows(
    x: jax.Array,
    residual: jax.Array | None,
    vectors: tuple[jax.Array | None, jax.Array | None, jax.Array | None],
    *,
    kind: str,
    eps: float,
    normed: bool = True,
    scales: str = "",
    summed: bool = False,
) -> list[jax.Array]:
    """The results of the op that `NormForm` asks for, of rows with any dimensions in front.

    Args:
      x: [.., h], bfloat16, float16 or float32.
      residual: [.., h] in the dtype of x, or None.
      vectors: bias, gamma and beta, [h] each, of any of these types, or None. The kernel reads them as they
        are where they have the dtype of x, else all of them are made float32.
      kind, eps, normed, scales, summed: see `NormForm`.
    """
    given = [one for one in vectors if one is not None]
    kinds = {np.dtype(one.dtype) for one in given}
    if kinds - {np.dtype(x.dtype)}:
        given = [one.astype(jnp.float32) for one in given]
    there = dict(zip(("residual", "bias", "gamma", "beta"), (residual, *vectors), strict=True))
    flags: dict[str, Any] = {name: one is not None for name, one in there.items()}
    form = NormForm(kind, **flags | {"normed": normed, "scales": scales, "summed": summed})
    rows = [x] if residual is None else [x, residual]
    if x.shape[-1] > MOST_FEATURES:
        return _on_xla(form, *rows, *given, eps=eps)
    op: Any = functools.partial(norm_op(form), eps=float(eps), dtype=np.dtype(x.dtype), fallback="reference")
    alone = x.ndim == 1
    rows = [one[None] for one in rows] if alone else rows
    for _ in range(x.ndim - 2):
        op = jax.vmap(op, (*(0,) * len(rows), *(None,) * len(given)))
    found = op(*same_varying_axes([*rows, *given]))
    return [one[0] for one in found] if alone else found


@functools.cache
def norm_op(form: NormForm) -> Op:
    """(x[, residual][, bias][, gamma][, beta]; eps) -> [norm][, values, scales][, sum]."""
    rows, vectors = 1 + form.residual, form.bias + form.gamma + form.beta
    results = ["r d"] * form.normed + ["r d", "r b"] * bool(form.scales) + ["r d"] * form.summed
    plain = functools.partial(_reference, form)
    return Op(
        f"norm_{form}",
        f"{', '.join(['r e'] * rows + ['e'] * vectors)} -> {', '.join(results)}",
        functools.partial(_result, form),
        plain,
        # cut where x is, along a dimension that no result asks for: never
        blocks={"d": ("e", 1), **({"b": ("e", TILE)} if form.scales else {})},
        kernel=LazyKernel("jax_deepgemm.ops.norm.kernel", "norm", form=form),
        jvp=None if form.scales else functools.partial(_jvp, plain),
        grad_hint=_HINT,
    )


def _result(form: NormForm, x: Dims, *_: Dims, eps: float, dtype: np.dtype) -> list[tuple[Dims, Any]]:
    tiles = ((x[0], -(-x[1] // TILE)), np.dtype(np.float32))
    fp8 = [(x, reference.E4M3), tiles] if form.scales else []
    return [(x, dtype)] * form.normed + fp8 + [(x, dtype)] * form.summed


def _reference(form: NormForm, *arrays: jax.Array, eps: float, dtype: np.dtype) -> list[jax.Array]:
    y, s = _norm_and_sum(form, *arrays, eps=eps)
    return _wanted(form, y, reference.quantized(y, form.scales) if form.scales else [], s)


def _on_xla(form: NormForm, *arrays: jax.Array, eps: float) -> list[jax.Array]:
    """Of rows that the kernel does not hold."""
    y, s = _norm_and_sum(form, *arrays, eps=eps)
    if not form.scales:
        return _wanted(form, y, [], s)
    found = quantize(y if y.ndim > 1 else y[None], (1, TILE), reference.E4M3, form.scales)
    parts = [found.values, found.scales]
    return _wanted(form, y, parts if y.ndim > 1 else [one[0] for one in parts], s)


def _norm_and_sum(form: NormForm, *arrays: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    flags = (True, form.residual, form.bias, form.gamma, form.beta)
    rest = iter(arrays)
    x, residual, bias, gamma, beta = (next(rest) if on else None for on in flags)
    assert x is not None
    s = reference.total(x, residual, bias)
    return reference.normed(s, gamma, beta, kind=form.kind, eps=eps), s


def _wanted(form: NormForm, y: jax.Array, fp8: list[jax.Array], s: jax.Array) -> list[jax.Array]:
    return [y] * form.normed + fp8 + [s] * form.summed


def _jvp(
    plain: Any, primals: list[Any], tangents: list[Any], *, eps: float, dtype: np.dtype, **_: Any
) -> Any:
    """That of the reference: plain arithmetic, as its own derivatives are."""
    given = [jnp.zeros_like(x) if t is None else t for x, t in zip(primals, tangents, strict=True)]
    arrays = same_varying_axes([*primals, *given])
    function = functools.partial(plain, eps=eps, dtype=dtype)
    return jax.jvp(function, arrays[: len(primals)], arrays[len(primals) :])[1]
