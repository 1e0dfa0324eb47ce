"""What functions on a cache check of their operands while tracing."""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.arrays import unwrapped

FLOAT32 = np.dtype(np.float32)
LARGEST = 2**31 - 1


def describe(x: Any) -> str:
    """An operand in a message.

    >>> describe(np.zeros((2, 3), np.int32)), describe("x")
    ('int32 [2, 3]', 'a str')
    """
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{np.dtype(x.dtype).name} {list(x.shape)}"
    return f"a {type(x).__name__}"


def positive(where: str, name: str, given: Any) -> int:
    """A size or an option that is a whole number, at least 1."""
    if isinstance(given, bool) or not isinstance(given, (int, np.integer)) or given < 1:
        raise ValueError(f"{where}: {name} is {given!r}, need a whole number, at least 1.")
    return int(given)


def array(where: str, name: str, given: Any, dtype: np.dtype, need: str, way_out: str) -> jax.Array:
    """An array of this dtype."""
    x = unwrapped(given)
    if not isinstance(x, (jax.Array, np.ndarray)) or x.dtype != dtype:
        wrong(where, name, x, need, way_out)
    return jnp.asarray(x)


def shaped(where: str, name: str, x: jax.Array, shape: tuple[int, ...], why: str) -> jax.Array:
    """An array of this shape."""
    if x.shape != shape:
        raise ValueError(f"{where}: {name} is {describe(x)}, need {list(shape)}: {why}")
    return x


def integers(where: str, name: str, given: Any, shape: tuple[int, ...], why: str) -> jax.Array:
    """int32 of this shape. What is beyond int32 is held to it: it names nothing, and must not wrap around."""
    x = np.asarray(given) if isinstance(given, (list, tuple)) else unwrapped(given)
    if not isinstance(x, (jax.Array, np.ndarray)) or not jnp.issubdtype(x.dtype, jnp.integer):
        wrong(where, name, x, f"integers {list(shape)}", "Make them: jnp.asarray(.., jnp.int32).")
    least, most = jnp.iinfo(x.dtype).min, jnp.iinfo(x.dtype).max
    if most > LARGEST:
        x = (np if isinstance(x, np.ndarray) else jnp).clip(x, max(int(least), -LARGEST - 1), LARGEST)
    return shaped(where, name, jnp.asarray(x).astype(jnp.int32), shape, why)


def layer_index(where: str, cache: Any, layer: Any) -> jax.Array:
    """int32 [1], of a cache that has layers."""
    if (layer is None) == cache.stacked:
        raise ValueError(
            f"{where}: layer is {layer} and the cache has {cache.layers} layers; it is one layer's cache, so "
            "leave layer out."
            if not cache.stacked
            else f"{where}: layer is None and the cache has {cache.layers} layers, need 0 to "
            f"{cache.layers - 1}: say layer=."
        )
    if layer is None:
        return jnp.zeros(1, jnp.int32)
    given = unwrapped(layer)
    known = isinstance(given, (int, np.integer)) and not isinstance(given, bool)
    if known and not 0 <= given < cache.layers:
        raise ValueError(f"{where}: layer is {given}, need 0 to {cache.layers - 1}: the cache has no more.")
    if not known and not isinstance(given, (jax.Array, np.ndarray)):
        wrong(where, "layer", given, "an int or an integer array []", "Layers count from 0.")
    x = integers(where, "layer", np.asarray(given) if known else given, (), "the index of one layer.")
    return x[None]


def wrong(where: str, name: str, x: Any, need: str, way_out: str) -> NoReturn:
    """Raises TypeError."""
    raise TypeError(f"{where}: {name} is {describe(x)}, need {need}. {way_out}")
