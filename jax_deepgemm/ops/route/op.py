"""Routing as ops. Tokens are cut freely; experts, and what is chosen of them, stay whole.

    route        logits[, bias]         -> ids, weights      no derivative: api.py gives the weights theirs
    tangent      logits, ids, dlogits   -> dweights          linear in dlogits, jnp
    gradient     logits, ids, dweights  -> dlogits           its transpose, a kernel

The derivatives of the last two are those of their references, so there are all orders.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.ops.route import reference
from jax_deepgemm.ops.route.family import beyond
from jax_deepgemm.ops.route.router import Router

ANYWHERE = {"fallback": "reference"}
"""Where no kernel runs (other platforms, symbolic sizes) jnp does; it is not slow enough to refuse."""
_WHOLE = {"k": ("e", 1), "f": ("e", 1)}
"""Cut where the experts of the operands are, which no result asks for: never."""


@functools.cache
def route_op(biased: bool, kernel: bool) -> Op:
    """(logits[, bias]) -> [ids, weights], with `router=`.

    Args:
      biased: whether there is a bias.
      kernel: whether the router is within the limits of the kernels.
    """

    def plain(logits: jax.Array, *bias: jax.Array, router: Router) -> list[jax.Array]:
        return reference.choose(logits, bias[0] if bias else None, router)

    return Op(
        "route_biased" if biased else "route",
        "t e, e -> t k, t k" if biased else "t e -> t k, t k",
        result=lambda x, *_, router: [((x[0], router.top_k), dtype) for dtype in (np.int32, np.float32)],
        reference=plain,
        blocks=_WHOLE,
        grad_hint="jax_deepgemm.moe.route has one.",
        **_run_by("route_biased" if biased else "route", kernel),
    )


@functools.cache
def tangent_op(kernel: bool) -> Op:
    """(logits, ids, dlogits) -> [dweights], with `router=`; linear in dlogits."""

    def transpose(index: int, cotangents: Any, operands: Any, *, router: Router, **_: Any) -> jax.Array:
        logits, ids, _ = operands
        return gradient_of(kernel, logits, ids, cotangents[0], router)

    return Op(
        "route_tangent",
        "t e, t k, t e -> t k",
        result=lambda x, ids, *_, router: [(ids, np.float32)],
        reference=lambda x, ids, by, *, router: [reference.tangent(x, ids, by, router)],
        blocks=_WHOLE,
        jvp=_derivative(reference.tangent),
        transpose=transpose,
    )


@functools.cache
def gradient_op(kernel: bool) -> Op:
    """(logits, ids, dweights) -> [dlogits], with `router=` and `out_dtype=`, the logits' dtype; linear in
    dweights."""

    def transpose(index: int, cotangents: Any, operands: Any, *, router: Router, **_: Any) -> jax.Array:
        logits, ids, _ = operands
        return tangent_op(kernel)(logits, ids, cotangents[0], router=router, **ANYWHERE)[0]

    return Op(
        "route_gradient",
        "t e, t k, t k -> t f",
        result=lambda x, *_, router, out_dtype: [(x, out_dtype)],
        reference=lambda x, ids, by, *, router, out_dtype: [reference.gradient(x, ids, by, router)],
        blocks=_WHOLE,
        jvp=_derivative(reference.gradient),
        transpose=transpose,
        **_run_by("route_gradient", kernel),
    )


def gradient_of(kernel: bool, logits: jax.Array, ids: jax.Array, by: jax.Array, router: Router) -> jax.Array:
    """The gradient of the logits, in their dtype."""
    op = gradient_op(kernel)
    return op(logits, ids, by, router=router, out_dtype=logits.dtype, **ANYWHERE)[0]


def _derivative(function: Callable[..., jax.Array]) -> Callable[..., list[jax.Array]]:
    """The jvp rule of function(logits, ids, by, router)."""

    def rule(primals: Any, tangents: Sequence[Any], *, router: Router, **_: Any) -> list[jax.Array]:
        logits, ids, by = primals
        moved = [jnp.zeros_like(x) if t is None else t for x, t in ((logits, tangents[0]), (by, tangents[2]))]
        return [jax.jvp(lambda x, y: function(x, ids, y, router), (logits, by), tuple(moved))[1]]

    return rule


def _run_by(name: str, kernel: bool) -> dict[str, Any]:
    """What cuda runs."""
    if kernel:
        return {"kernel": LazyKernel("jax_deepgemm.ops.route.kernel", name)}
    return {"without_kernel": _on_xla}


def _on_xla(avals: Sequence[Any], *, router: Router, **_: Any) -> str:
    return f"route: {beyond(avals[0].shape[-1], router)}, so XLA sorts, which is slow."
