"""How weights are drawn: matrix by matrix, as Flax's initialisers expect, and each device's part in place."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm.core.sharding import entries
from jax_deepgemm.flax.variables import partition_spec, sharding_metadata

Initializer = Callable[..., jax.Array]
lecun_normal: Initializer = nnx.initializers.lecun_normal()
zeros: Initializer = nnx.initializers.zeros_init()


@dataclass(frozen=True)
class GateUp:
    """An initialiser that draws gate and up for themselves, (in, out / 2) each, side by side or in turns."""

    init: Initializer
    interleaved: bool = False

    def __call__(self, key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
        half = (shape[0], shape[1] // 2)
        parts = [self.init(key, half, dtype) for key in jax.random.split(key)]
        if self.interleaved:
            return jnp.stack(parts, axis=-1).reshape(shape)
        return jnp.concatenate(parts, axis=1)


def draw(
    where: str,
    init: Initializer,
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: Any,
    *,
    spec: P | None = None,
    mesh: Mesh | None = None,
    turned: bool = True,
    apart: bool = False,
) -> nnx.Param:
    """A Param [size], [out, in] or [experts, out, in], from an initialiser of vectors or matrices (in, out).

    Args:
      where: the layer to name in errors.
      init: called with (key, (size,) or (in, out), dtype); with experts once for each, by keys split from
        `key`.
      shape: (size,), (in, out) or (experts, in, out).
      spec: how the Param is cut; kept as its metadata.
      mesh: the mesh of that; default: that of `jax.set_mesh`. With neither, nothing is cut yet.
      turned: False: stored (in, out) as drawn, of experts.
      apart: whether out has its two halves in a dimension of their own, of experts.
    """
    value = _in_place(_Draw(where, init, shape, np.dtype(dtype), turned, apart), key, spec, mesh)
    return nnx.Param(value, **sharding_metadata(spec))


@dataclass(frozen=True)
class _Draw:
    """From a key to a stored weight."""

    where: str
    init: Initializer
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    turned: bool = True
    apart: bool = False

    @property
    def stored(self) -> tuple[int, ...]:
        if len(self.shape) == 1:
            return self.shape
        *lead, inputs, outputs = self.shape
        out = (2, outputs // 2) if self.apart else (outputs,)
        return (*lead, *out, inputs) if self.turned else (*lead, inputs, *out)

    def __call__(self, key: jax.Array) -> jax.Array:
        if len(self.shape) == 1:
            return self._drawn(key)
        if len(self.shape) == 2:
            return self._drawn(key).T
        keys = jax.random.split(key, self.shape[0])
        drawn = jax.vmap(lambda key: self._drawn(key).T if self.turned else self._drawn(key))(keys)
        return drawn.reshape(self.stored)

    def _drawn(self, key: jax.Array) -> jax.Array:
        """The vector, or one matrix (in, out)."""
        shape = self.shape[-2:]
        array = self.init(key, shape, self.dtype)
        if isinstance(array, nnx.VariableMetadata):
            raise TypeError(
                f"{self.where}: an initialiser returned an array with metadata (nnx.with_partitioning), "
                "need an array. Say how the weight is cut by sharding= of Linear or expert_axis= of MoE."
            )
        array = jnp.asarray(array)
        if array.shape != shape:
            raise ValueError(
                f"{self.where}: an initialiser returned {list(array.shape)}, need {list(shape)}, "
                "(in_features, out_features) as in nnx.Linear: the layer stores it transposed. Transpose "
                "what has the stored shape."
            )
        return array


def _in_place(draw: _Draw, key: jax.Array, spec: P | None, mesh: Mesh | None) -> jax.Array:
    """draw(key), of which each device makes its part only; whole if no mesh says what the parts are."""
    context = jax.sharding.get_abstract_mesh()
    axes = mesh or context
    if spec is None or axes.empty or context.manual_axes:
        return draw(key)
    spec = _on_mesh(spec)
    _check_cut(draw.where, draw.stored, spec, dict(axes.shape))
    sharding = spec if mesh is None else NamedSharding(mesh, spec)
    return _program(draw, sharding, bool(context.explicit_axes))(key)


@functools.lru_cache(maxsize=64)
def _program(draw: _Draw, sharding: P | NamedSharding, explicit: bool) -> Callable[[jax.Array], jax.Array]:
    cut = jax.sharding.auto_axes(draw, out_sharding=sharding) if explicit else draw
    return jax.jit(cut, out_shardings=sharding)


def _on_mesh(spec: P) -> P:
    """The spec in axes of the mesh, where it names logical axes that Flax has rules for."""
    return partition_spec(nnx.Variable(None, **sharding_metadata(spec))) or P()


def _check_cut(where: str, shape: tuple[int, ...], spec: P, mesh: dict[str, int]) -> None:
    for size, axes in zip(shape, entries(spec, len(shape)), strict=True):
        missing = [axis for axis in axes if axis not in mesh]
        if missing:
            raise ValueError(
                f"{where}: a weight {list(shape)} is cut by {spec} and the mesh is {mesh}, which has no axis "
                f"{missing[0]!r}. Name one of its axes."
            )
        parts = math.prod(mesh[axis] for axis in axes)
        if size % parts:
            raise ValueError(
                f"{where}: a weight {list(shape)} is cut by {spec} and the mesh is {mesh}: {size} is no "
                f"multiple of {parts} devices. Choose sizes that are, or leave this dimension whole."
            )
