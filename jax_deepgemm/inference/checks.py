"""What the functions of this package say of operands that do not fit: what was given, the rule, what to
do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.ops.quantize.fp4 import shown

FLOATS = tuple(np.dtype(kind) for kind in (jnp.bfloat16, jnp.float16, jnp.float32))


def described(x: Any) -> str:
    """The dtype and shape of an array, or what else something is."""
    return "None" if x is None else shown(x)


def floats(op: str, name: str, given: Any, *, like: Any = None) -> jax.Array:
    """An array of a type that these functions compute with, or of the type of another operand."""
    x = unwrapped(given)
    dtype = np.dtype(getattr(x, "dtype", np.void))
    if dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} is {described(x)}, need a bfloat16, float16 or float32 array: "
            f"{_as(name, x, 'bfloat16')}."
        )
    if like is not None and dtype != like.dtype:
        raise TypeError(
            f"{op}: {name} is {described(x)}, need {like.dtype.name} as the other operand: "
            f"{name}.astype(jnp.{like.dtype.name})."
        )
    return jnp.asarray(x)


def _as(name: str, x: Any, dtype: str) -> str:
    """What to write in place of an operand: lists and numbers have no `astype`."""
    return f"{name}.astype(jnp.{dtype})" if hasattr(x, "astype") else f"jnp.asarray({name}, jnp.{dtype})"


def integers(op: str, name: str, given: Any, dims: str) -> jax.Array:
    """Integers of an operand as int32."""
    x = unwrapped(given)
    if isinstance(x, int | np.integer) and not isinstance(x, bool):
        return jnp.asarray(x, jnp.int32)
    if not jnp.issubdtype(getattr(x, "dtype", np.void), jnp.integer):
        raise TypeError(f"{op}: {name} is {described(x)}, need integers {dims}: {_as(name, x, 'int32')}.")
    return jnp.asarray(x).astype(jnp.int32)


def shaped(op: str, name: str, x: jax.Array, shape: Sequence[int], why: str) -> jax.Array:
    """x, which must have this shape."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} is {list(x.shape)}, need {list(shape)}: {why}.")
    return x


def fitted(op: str, name: str, x: jax.Array, shape: Sequence[int], dims: str) -> jax.Array:
    """x with dimensions of 1 in front, where it broadcasts to a shape."""
    lead = len(shape) - x.ndim
    sizes = (1,) * lead + x.shape
    if lead < 0 or any(mine not in (1, wanted) for mine, wanted in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"{op}: {name} is {list(x.shape)}, need what broadcasts to {dims} = {list(shape)}: each "
            "dimension 1 or as there."
        )
    return jnp.expand_dims(x, tuple(range(lead)))


def vector(op: str, name: str, given: Any, size: int) -> jax.Array:
    """A number for each feature, [size]."""
    return shaped(op, name, floats(op, name, given), (size,), f"one number for each of {size} features")


def row(op: str, name: str, given: Any, size: int, ndim: int) -> jax.Array:
    """A vector of a number for each feature, in float32, with dimensions of 1 in front."""
    x = vector(op, name, given, size)
    return jnp.expand_dims(x.astype(jnp.float32), tuple(range(ndim - 1)))


def choice(op: str, name: str, given: Any, allowed: Collection[Any]) -> Any:
    """An option that is one of a few words."""
    if given not in allowed:
        words = ", ".join(repr(one) for one in allowed)
        raise ValueError(f"{op}: {name} is {given!r}, need one of {words}.")
    return given


def whole(op: str, name: str, given: Any, least: int) -> int:
    """A Python int that is not less than a bound."""
    if isinstance(given, bool) or not isinstance(given, int | np.integer) or given < least:
        raise ValueError(f"{op}: {name} is {given!r}, need a whole number, at least {least}.")
    return int(given)
