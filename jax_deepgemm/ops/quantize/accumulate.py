"""Gradients of microbatches added up in the buffer of their sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.ops.quantize.prepared import PreparedWeight


def accumulate_gradients(
    loss: Callable[..., Any], weights: Any, sums: Any, *args: Any, has_aux: bool = False
) -> Any:
    """The value of a loss, and sums + its gradients, which the products of weight gradients add themselves.

    A layer called with `with_weight=True` returns (y, w), the weight as it came. A loss that returns these
    weights beside its value has, in the language of `jax.vjp`, a second result, and the sums so far are its
    cotangent: the backward pass begins with them, and each layer's product reads and writes the sum in its
    epilogue, in place if nothing else holds it. Where a weight does not go through such a layer (a bias, a
    layer in bfloat16), return it as it is, and XLA adds. The numbers are right either way.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import accumulate_gradients, fp8_linear, prepare_weight
    >>> w = jax.random.normal(jax.random.key(0), (256, 128), jnp.bfloat16) / 16
    >>> batches = jax.random.normal(jax.random.key(1), (4, 32, 128), jnp.bfloat16)
    >>> def loss(weights, x):
    ...     y, w = fp8_linear(x, weights["w"], with_weight=True)
    ...     return jnp.mean(y.astype(jnp.float32) ** 2), {"w": w}
    >>> @jax.jit
    ... def gradients(w):
    ...     prepared = {"w": prepare_weight(w)}
    ...     def body(sums, x):
    ...         value, sums = accumulate_gradients(loss, prepared, sums, x)
    ...         return sums, value
    ...     return jax.lax.scan(body, {"w": jnp.zeros(w.shape, jnp.float32)}, batches)
    >>> sums, values = gradients(w)
    >>> sums["w"].dtype.name, values.shape
    ('float32', (4,))

    Args:
      loss: called with (weights, *args), returns (value, weights), or with has_aux (value, weights, aux): a
        scalar, and the pytree it was given with weights as they came out of layers.
      weights: a pytree of PreparedWeights and of bfloat16 or float32 arrays.
      sums: the same pytree, with an array [..] of its weight's shape for each: the gradients so far,
        bfloat16 or float32. Gradients are computed in the dtype of their sum.
      *args: what else the loss takes; not differentiated.
      has_aux: whether the loss returns a third thing, which is passed on.

    Returns:
      (value, sums), or with has_aux (value, sums, aux).

    Raises:
      ValueError: sums, or weights that the loss returns, of another structure or shape; a value that is no
        scalar.

    Use it in a `jax.lax.scan` whose carry is the sums, as above, or in a jitted function to which they are
    donated. Inside `jax.shard_map`, weights that are the same on several devices are first made varying
    (`jax.lax.pcast`), and the sums are added over devices once, after the last microbatch.
    """
    given, tree = jax.tree.flatten(weights, is_leaf=_is_prepared)
    so_far = _matched("sums", tree, sums)
    slots = [_slot(w, one) for w, one in zip(given, so_far, strict=True)]

    def run(slots: list[jax.Array]) -> Any:
        used = [_used(w, slot) for w, slot in zip(given, slots, strict=True)]
        value, after, *aux = loss(jax.tree.unflatten(tree, used), *args)
        if jnp.shape(value) != ():
            raise ValueError(
                f"accumulate_gradients: the loss is {list(jnp.shape(value))}, need a scalar. Take a mean, "
                "or a sum."
            )
        left = _matched("the weights that the loss returns", tree, after)
        return (value, [_left(w, slot, one) for w, slot, one in zip(given, slots, left, strict=True)]), aux

    (value, _), pull, aux = jax.vjp(run, slots, has_aux=True)
    (totals,) = pull((jnp.ones_like(value), so_far))
    result = value, jax.tree.unflatten(tree, totals)
    return (*result, *aux) if has_aux else result


def _is_prepared(x: Any) -> bool:
    return isinstance(x, PreparedWeight)


def _matched(what: str, tree: Any, given: Any) -> list[Any]:
    leaves, structure = jax.tree.flatten(given, is_leaf=_is_prepared)
    if structure != tree:
        raise ValueError(
            f"accumulate_gradients: {what} are {structure} and the weights are {tree}, need the same pytree."
            " A loss returns (value, weights), each weight as it came out of its layer, or as it is."
        )
    return leaves


def _slot(w: Any, so_far: jax.Array) -> jax.Array:
    """What is differentiated for a weight, in the dtype of the sum. Layers do not read a prepared master."""
    if isinstance(w, PreparedWeight):
        return w.with_master(so_far).master
    if jnp.shape(w) != jnp.shape(so_far):
        raise ValueError(
            f"accumulate_gradients: a sum is {list(jnp.shape(so_far))} and its weight is "
            f"{list(jnp.shape(w))}, need the same shape. Begin with jnp.zeros_like(weight)."
        )
    return jnp.asarray(w).astype(so_far.dtype)


def _used(w: Any, slot: jax.Array) -> Any:
    return w.with_master(slot) if isinstance(w, PreparedWeight) else slot.astype(w.dtype)


def _left(w: Any, slot: jax.Array, after: Any) -> jax.Array:
    """Where the sum so far enters: behind all layers, but not behind a conversion, which would round it."""
    if isinstance(w, PreparedWeight):
        return after.master
    return after if np.dtype(w.dtype) == slot.dtype else slot
