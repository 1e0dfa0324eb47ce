"""Small doubly stochastic matrices as ops.

    sinkhorn            logits      -> matrices
    sinkhorn_tangent    logits, by  -> the matrices' tangent, for that of the logits; jnp
    sinkhorn_gradient   logits, by  -> the logits' gradient, for that of the matrices; its transpose

Matrices are cut over devices freely, and each is whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core.declaration import Dims
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.ops.sinkhorn import reference
from jax_deepgemm.ops.sinkhorn.family import beyond

ANYWHERE = {"fallback": "reference"}
"""Where no kernel runs (other platforms, symbolic sizes) jnp does."""


def _result(logits: Dims, *_: Dims, **__: Any) -> list[tuple[Dims, Any]]:
    return [(logits, jnp.float32)]


def _form(params: dict[str, Any]) -> dict[str, Any]:
    return {name: params[name] for name in ("iterations", "eps")}


def _linear_jvp(
    kernel: bool,
    name: str,
    function: Callable[..., jax.Array],
    primals: list[Any],
    tangents: list[Any],
    **params: Any,
) -> list[jax.Array]:
    """That of an op which is linear in its last operand: itself, and what plain jnp gives for the logits."""
    (logits, by), (of_logits, of_by) = primals, tangents
    form = _form(params)
    terms = [] if of_by is None else sinkhorn_op(name, kernel)(logits, of_by, **form, **ANYWHERE)
    if of_logits is not None:
        terms.append(jax.jvp(lambda x: function(x, by, **form), (logits,), (of_logits,))[1])
    return [functools.reduce(jnp.add, terms)]


def _linear_transpose(
    kernel: bool, other: str, which: int, cotangents: list[Any], operands: list[Any], **params: Any
) -> jax.Array:
    return sinkhorn_op(other, kernel)(operands[0], cotangents[0], **_form(params), **ANYWHERE)[0]


def _on_xla(avals: Any, *, iterations: int, **_: Any) -> str:
    return f"sinkhorn: {beyond(avals[0].shape[-1], iterations)}, so XLA runs a loop of small kernels."


@functools.cache
def sinkhorn_op(name: str, kernel: bool) -> Op:
    """An op of this module, with `iterations=` and `eps=`.

    Args:
      name: "sinkhorn", "sinkhorn_tangent" or "sinkhorn_gradient".
      kernel: whether the call is within the limits of the kernels.
    """
    plain: Any = {
        "sinkhorn": reference.sinkhorn,
        "sinkhorn_tangent": reference.push,
        "sinkhorn_gradient": reference.pull,
    }[name]
    runs: dict[str, Any] = {"without_kernel": _on_xla}
    if name == "sinkhorn_tangent":
        runs = {}
    elif kernel:
        runs = {"kernel": LazyKernel("jax_deepgemm.ops.sinkhorn.kernel", "sinkhorn", kind=name)}
    if name == "sinkhorn":
        runs["jvp"] = lambda primals, tangents, **params: sinkhorn_op("sinkhorn_tangent", kernel)(
            *primals, *tangents, **_form(params), **ANYWHERE
        )
    else:
        other = {"sinkhorn_tangent": "sinkhorn_gradient", "sinkhorn_gradient": "sinkhorn_tangent"}[name]
        runs["jvp"] = functools.partial(_linear_jvp, kernel, name, plain)
        runs["transpose"] = functools.partial(_linear_transpose, kernel, other)
    return Op(
        name,
        "t i j -> t i j" if name == "sinkhorn" else "t i j, t i j -> t i j",
        _result,
        lambda *arrays, iterations, eps, **_: [plain(*arrays, iterations=iterations, eps=eps)],
        blocks={"i": ("whole", 1), "j": ("whole", 1)},  # cut where that is, which is nowhere
        **runs,
    )
