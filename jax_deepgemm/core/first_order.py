"""Functions whose first derivative, in reverse mode, is all there is, and that say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


class ReverseOnly:
    """jax.custom_vjp of function(static, *arguments), whose errors in forward mode and for second derivatives
    say what to use.

    Args:
      where: the public function.
      instead: what has the derivatives that this one lacks, a phrase.
      function: first argument static, the others trees of arrays.
      gradients: what they are called.
    """

    def __init__(
        self, where: str, instead: str, function: Callable[..., Any], gradients: str = "FP8 gradients"
    ) -> None:
        self._message = (
            f"{where}: {gradients} are of first order and in reverse mode (jax.grad, jax.vjp). For forward "
            f"mode (jax.jvp, jax.jacfwd, jax.linearize) and for second derivatives use {instead}."
        )
        self._function = jax.custom_vjp(function, nondiff_argnums=(0,))

    def defvjp(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        """As jax.custom_vjp's."""

        def first_forward(static: Any, *args: Any) -> Any:
            return forward(static, *self._each(_constant, args))

        def first_backward(static: Any, kept: Any, cotangents: Any) -> Any:
            return backward(static, *self._each(_constant, (kept, cotangents)))

        self._function.defvjp(first_forward, first_backward)

    def __call__(self, static: Any, *args: Any) -> Any:
        return self._function(static, *self._each(_reverse_only, args))

    def _each(self, mark: Callable[..., Any], args: Any) -> Any:
        def leaf(x: Any) -> Any:
            return mark(self._message, x) if jnp.issubdtype(x.dtype, jnp.inexact) else x

        return jax.tree.map(leaf, args)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _constant(message: str, x: jax.Array) -> jax.Array:
    """x, which has no derivative."""
    return x


@_constant.defjvp
def _(message: str, primals: Any, tangents: Any) -> NoReturn:
    raise TypeError(message)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _reverse_only(message: str, x: jax.Array) -> jax.Array:
    """x, whose tangent is only to be transposed."""
    return x


@_reverse_only.defjvp
def _(message: str, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _reverse_only(message, *primals), _tangent_p.bind(*tangents, message=message)


_tangent_p = Primitive("jax_deepgemm_tangent")
"""A tangent that nobody computes: its transpose is the identity."""


def _raise(*_: Any, message: str) -> NoReturn:
    raise TypeError(message)


_tangent_p.def_impl(_raise)
_tangent_p.def_abstract_eval(lambda tangent, *, message: tangent)
mlir.register_lowering(_tangent_p, _raise)
ad.deflinear2(_tangent_p, lambda cotangent, _, *, message: [cotangent])
batching.primitive_batchers[_tangent_p] = lambda tangents, dims, *, message: (
    _tangent_p.bind(*tangents, message=message),
    dims[0],
)
