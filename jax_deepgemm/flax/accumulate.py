"""Gradients of a module's microbatches, added up in the buffers of their sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jax_deepgemm.flax.prepared import HANDS_ON, beside, fp8_weights
from jax_deepgemm.ops.quantize import accumulate
from jax_deepgemm.ops.quantize.prepared import PreparedWeight, as_it_came, master_and_copies


def accumulate_gradients(
    loss: Callable[..., Any], module: nnx.Module, sums: nnx.State, *args: Any, has_aux: bool = False
) -> Any:
    """The value of a loss of a module, and sums + its gradients: `jax_deepgemm.accumulate_gradients` for nnx.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from jax_deepgemm.flax import Linear, accumulate_gradients, prepared_weights
    >>> layer = Linear(256, 128, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    >>> batches = jnp.ones((4, 16, 256), jnp.bfloat16)
    >>> loss = lambda layer, x: jnp.mean(layer(x).astype(jnp.float32) ** 2)
    >>> @nnx.jit
    ... def gradients(layer, batches):
    ...     body = lambda sums, x: accumulate_gradients(loss, layer, sums, x)[::-1]
    ...     zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), nnx.state(layer, nnx.Param))
    ...     with prepared_weights(layer):
    ...         return jax.lax.scan(body, zeros, batches)
    >>> sums, values = gradients(layer, batches)
    >>> sums["weight"].get_value().dtype.name, values.shape
    ('float32', (4,))

    The weights of `Linear` in FP8, and of `MoE` in FP8 without an expert axis, are added to where their
    products write them; XLA adds the gradients of all others.

    Args:
      loss: called with (module, *args), returns a scalar, or with has_aux (scalar, aux).
      module: its `nnx.Param`s are differentiated. Inside `prepared_weights` their FP8 copies are used.
      sums: an `nnx.State` as `nnx.grad` returns it: the gradients so far [..] of every Param, bfloat16 or
        float32. Gradients are computed in the dtype of their sum.
      *args: what else the loss takes; not differentiated.
      has_aux: whether the loss returns a second thing, which is passed on.

    Returns:
      (value, sums), or with has_aux (value, sums, aux). Other state that the loss changed (counts of random
      numbers, statistics) is changed in the module, as by `nnx.value_and_grad`; in a scan that needs
      `nnx.scan`.

    Raises:
      ValueError: sums of other Params or shapes; a value that is no scalar.
    """
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    variables, so_far, copies = (dict(nnx.to_flat_state(state)) for state in (params, sums, rest))
    if set(variables) != set(so_far):
        raise ValueError(
            f"accumulate_gradients: sums are those of {_names(so_far)} and the module has "
            f"{_names(variables)}, need one for each nnx.Param. Begin with jax.tree.map(jnp.zeros_like, "
            "nnx.state(module, nnx.Param))."
        )
    paths = list(variables)

    def weight(path: Any) -> Any:
        value = variables[path].get_value()
        found = copies.get((*path[:-1], beside(str(path[-1]))))
        return value if found is None else PreparedWeight(value, found.get_value())

    def state(masters: list[Any]) -> nnx.State:
        pairs = zip(paths, masters, strict=True)
        return nnx.from_flat_state([(path, variables[path].replace(value)) for path, value in pairs])

    def run(weights: list[Any]) -> Any:
        own = jax.tree.map(lambda leaf: leaf, rest)  # variables of this trace, which the loss may set
        inner = nnx.merge(graph, state([master_and_copies(w)[0] for w in weights]), own)
        for layer, _ in fp8_weights(inner):
            setattr(layer, HANDS_ON, True)
        value, *aux = loss(inner, *args) if has_aux else (loss(inner, *args),)
        after, others = nnx.state(inner, nnx.Param, ...)
        left = dict(nnx.to_flat_state(after))
        handed_on = [as_it_came(w, left[path].get_value()) for w, path in zip(weights, paths, strict=True)]
        return value, handed_on, (aux, others)

    starts = [so_far[path].get_value() for path in paths]
    value, totals, (aux, others) = accumulate.accumulate_gradients(
        run, [weight(path) for path in paths], starts, has_aux=True
    )
    _update(module, rest, others)
    return (value, state(totals), *aux)


def _update(module: nnx.Module, before: nnx.State, after: nnx.State) -> None:
    """What of the other state is not what it was."""
    known = dict(nnx.to_flat_state(before))
    changed = [
        (path, variable)
        for path, variable in nnx.to_flat_state(after)
        if any(map(_differ, *(jax.tree.leaves(one.get_value()) for one in (variable, known[path]))))
    ]
    if changed:
        nnx.update(module, nnx.from_flat_state(changed))


def _differ(one: Any, other: Any) -> bool:
    return one is not other


def _names(paths: Any) -> list[str]:
    return sorted(".".join(map(str, path)) for path in paths)
