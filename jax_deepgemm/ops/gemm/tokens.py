"""Leading dimensions of activations as one dimension of tokens, and back, without moving data between
devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import PartitionSpec

from jax_deepgemm.core.sharding import Axes, as_spec, entries


@dataclass(frozen=True)
class Tokens:
    """How [.., features] becomes [tokens, features].

    On Explicit axes each device flattens its own piece, whatever leading dimensions are cut, so the tokens of
    the global view come in another order than a reshape would give; a linear layer does not mind, and
    `unflatten` undoes it. On Auto axes it is a reshape: no data moves if of the leading dimensions only the
    first is cut.

    Attributes:
      lead: sizes of the leading dimensions.
      cuts: mesh axes of each of them, on Explicit axes; empty tuples elsewhere.
    """

    lead: tuple[int, ...]
    cuts: tuple[Axes, ...]

    @classmethod
    def of(cls, x: jax.Array) -> Tokens:
        aval = jax.typeof(x)
        count = x.ndim - 1
        if not aval.sharding.mesh.explicit_axes:
            return cls(tuple(x.shape[:-1]), ((),) * count)
        return cls(tuple(x.shape[:-1]), tuple(entries(aval.sharding.spec, x.ndim)[:count]))

    @property
    def axes(self) -> Axes:
        """Mesh axes that cut the tokens."""
        return tuple(axis for cut in self.cuts for axis in cut)

    def flat_spec(self, features: Axes) -> PartitionSpec:
        """Spec of [tokens, features]."""
        return as_spec([self.axes, features])

    def full_spec(self, features: Axes) -> PartitionSpec:
        """Spec of [.., features]."""
        return as_spec([*self.cuts, features])

    def flatten(self, x: jax.Array) -> jax.Array:
        """[.., features] -> [tokens, features]."""
        if len(self.lead) == 1:
            return x
        if not self.axes:
            return x.reshape(math.prod(self.lead), x.shape[-1])
        features = entries(jax.typeof(x).sharding.spec, x.ndim)[-1]
        return _on_each_device(
            lambda local: local.reshape(math.prod(local.shape[:-1]), local.shape[-1]),
            x,
            self.full_spec(features),
            self.flat_spec(features),
        )

    def unflatten(self, y: jax.Array) -> jax.Array:
        """[tokens, features] -> [.., features]."""
        if len(self.lead) == 1:
            return y
        if not self.axes:
            return y.reshape(*self.lead, y.shape[-1])
        aval = jax.typeof(y)
        features = entries(aval.sharding.spec, 2)[-1]
        local_lead = _local_shape(self.lead, self.cuts, dict(aval.sharding.mesh.shape))
        return _on_each_device(
            lambda local: local.reshape(*local_lead, local.shape[-1]),
            y,
            self.flat_spec(features),
            self.full_spec(features),
        )


def _local_shape(shape: Sequence[int], cuts: Sequence[Axes], mesh: dict[str, int]) -> tuple[int, ...]:
    return tuple(size // math.prod(mesh[axis] for axis in cut) for size, cut in zip(shape, cuts, strict=True))


def _on_each_device(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, in_spec: PartitionSpec, out_spec: PartitionSpec
) -> jax.Array:
    mesh = jax.typeof(x).sharding.mesh
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.shard_map(
            function, in_specs=in_spec, out_specs=out_spec, axis_names=set(mesh.explicit_axes)
        )(x)
