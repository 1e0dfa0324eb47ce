"""Calls of ops to tune: of the benchmark's tables, of a shapes file; and operands for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.bench import Row
from jax_deepgemm.core.shapes import CallShape
from jax_deepgemm.tools.bench import catalog

_PERIOD = 1_000_003  # elements after which operands repeat: a prime, so that rows differ
_LARGEST = 2.75  # of 128 standard normal numbers, on average
_FLOAT32 = 2**-7  # scales, and float32 C


@dataclass(frozen=True)
class Work:
    """One call of an op to tune.

    Attributes:
      name: for messages.
      function: calls one op of this package, and leaves `config` open.
      operands: its arguments. Arrays are used as they are; for `jax.ShapeDtypeStruct`s see `drawn`.
      carry: the argument that the result takes the place of, if there is one; what is given is copied.
    """

    name: str
    function: Callable[..., Any]
    operands: tuple[Any, ...]
    carry: int | None = None


def tables() -> dict[str, list[Row]]:
    """Returns the rows of those tables of `bench` that are single calls of ops.

    >>> list(tables())[:3], list(tables())[-1]
    (['fp8', 'fp8_wgrad', 'bf16'], 'shapes')
    """
    return {name: list(one.rows(False)) for name, one in catalog.tables().items() if one.tuned}


def of_row(row: Row) -> Work:
    """Returns what a row of a table calls, its operands not drawn yet.

    >>> of_row(tables()["bf16"][1]).operands[1].shape
    (2112, 7168)
    """
    operands = jax.eval_shape(lambda: row.operands(row.draw()))
    return Work(row.name, row.function, (*operands, *row.constants), row.carry)


def of_shape(shape: CallShape) -> Work:
    """Returns the product of a line of a shapes file.

    >>> from jax_deepgemm.tools.shape_files import shape_of
    >>> of_shape(shape_of({"op": "bf16_gemm_nn", "m": 64, "n": 128, "k": 256})).operands[1].shape
    (256, 128)

    Raises:
      ValueError: a layer, which is several products.
    """
    if shape.LAYER:
        raise ValueError(f"{shape} is a layer of several GEMMs, need one to tune: name each of them")
    [call] = shape.calls()
    return Work(str(shape), call.function, call.operands, call.carry)


def drawn(calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Makes arrays of the `jax.ShapeDtypeStruct`s in the operands of some calls, and puts all on the device.

    Elements of one or two bytes are standard normal, those of FP8 in the range that quantising gives them;
    uint8 are bytes of such FP8 numbers; float32 (scales and C) is constant.
    Calls whose first (second, ...) operands are alike share them.

    >>> [(a, b)] = drawn([(jax.ShapeDtypeStruct((2, 3), jnp.float32), np.arange(2))])
    >>> a.shape, b.tolist()
    ((2, 3), [0, 1])
    """
    flat: list[tuple[list[Any], Any]] = [jax.tree.flatten(operands) for operands in calls]
    wanted: dict[tuple[Any, ...], None] = {}
    for leaves, _ in flat:
        wanted |= {_kind(i, x): None for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)}
    kinds = tuple((shape, dtype) for _, shape, dtype in wanted)
    noise = {dtype: _noise(dtype) for _, dtype in kinds if dtype != "float32"}
    made = dict(zip(wanted, _made(kinds, noise), strict=True))
    return [
        structure.unflatten(
            [
                made[_kind(i, x)] if isinstance(x, jax.ShapeDtypeStruct) else jax.device_put(x)
                for i, x in enumerate(leaves)
            ]
        )
        for leaves, structure in flat
    ]


def _kind(position: int, leaf: Any) -> tuple[Any, ...]:
    return position, leaf.shape, str(leaf.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _made(kinds: tuple[tuple[tuple[int, ...], str], ...], noise: dict[str, jax.Array]) -> list[jax.Array]:
    """One program for all of a session."""
    return [
        jnp.full(shape, _FLOAT32, jnp.float32) if dtype == "float32" else jnp.resize(noise[dtype], shape)
        for shape, dtype in kinds
    ]


@functools.cache
def _noise(dtype: str) -> jax.Array:
    if dtype == "uint8":
        return jax.lax.bitcast_convert_type(_noise("float8_e4m3fn"), jnp.uint8)
    numbers = np.random.default_rng(0).standard_normal(_PERIOD, np.float32)
    if jnp.dtype(dtype).itemsize == 1:
        numbers = np.clip(numbers / _LARGEST, -1, 1) * np.float32(jnp.finfo(dtype).max)
    return jnp.asarray(numbers.astype(jnp.dtype(dtype)))
