"""The inner size of the experts cut over a mesh axis beside that of the experts (tensor parallelism).

Each device d of the axis has i / devices features of gate, of up and of the down projection of its experts:

    y = sum over d of f(gate_d, up_d) @ w2_d.T        gate_d | up_d = x @ w13_d.T

so that nothing but x and y travels over the axis:

    tokens equal on its devices    forward one all-reduce of y; backward of dx, and of the routing weights'
    tokens cut over it             forward x, ids and weights gathered, y reduce-scattered; backward the same
                                   in the other direction

which of the two it is, is in the type of x.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jax_deepgemm.core.sharding import as_spec
from jax_deepgemm.moe.exchange import Axis, axis_names
from jax_deepgemm.moe.form import ExpertForm
from jax_deepgemm.moe.placement import cuts
from jax_deepgemm.moe.shared import SharedExperts
from jax_deepgemm.ops.gemm.reference import SCALE_BLOCK
from jax_deepgemm.ops.grouped.checks import as_int32
from jax_deepgemm.ops.quantize import PreparedFp4, PreparedWeight


@dataclass(frozen=True)
class TensorAxis:
    """Inside shard_map.

    Attributes:
      names: the mesh axes; none: nothing is cut.
      scatters: whether tokens are cut over them.
    """

    names: tuple[str, ...] = ()
    scatters: bool = False

    @classmethod
    def of(cls, where: str, axis: Axis | None, experts: Axis, tokens: Sequence[jax.Array]) -> TensorAxis:
        names = () if axis is None else axis_names(axis)
        if set(names) & set(axis_names(experts)):
            raise ValueError(
                f"{where}: tensor_axis is {axis!r} and the experts are cut over {experts!r}, need other axes "
                "of the mesh."
            )
        untracked = [name for name in names if name not in _varying(lax.axis_index(name))]
        if untracked:
            raise ValueError(
                f"{where}: tensor_axis is {axis!r} inside a shard_map with check_vma=False, where types do "
                "not say whether tokens are cut over it, need check_vma=True, the default."
            )
        return cls(names, any(set(names) & _varying(x) for x in tokens))

    @property
    def devices(self) -> int:
        return math.prod(lax.axis_size(name) for name in self.names)

    def tokens(
        self, x: jax.Array, ids: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Those that every device of the axis works on."""
        if not self.names:
            return x, ids, weights
        if not self.scatters:
            return self._own(x), ids, self._own(weights)
        ids = jnp.clip(as_int32("dispatch", "ids", ids, "[t, top_k]"), -1, 2**24)
        both = self._gather(
            jnp.concatenate([ids.astype(jnp.float32), weights], axis=1)
        )  # exact, and one less
        ids, weights = jnp.split(both, 2, axis=1)
        return self._gather(x), ids.astype(jnp.int32), weights

    def sum(self, y: jax.Array) -> jax.Array:
        """Of all devices' parts of y, for this device's tokens."""
        if not self.names:
            return y
        if not self.scatters:
            return lax.psum(y, self.names)
        return lax.psum_scatter(self._own(y), self.names, scatter_dimension=0, tiled=True)

    def of_own_tokens(self, numbers: jax.Array) -> jax.Array:
        """Those of this device's tokens, where each device has them all."""
        if not self.scatters:
            return numbers
        each = numbers.shape[0] // self.devices
        return lax.dynamic_slice_in_dim(numbers, lax.axis_index(self.names) * each, each)

    def once(self, bias: jax.Array | None) -> jax.Array | None:
        """A bias of y on one device of the axis, zeros on the others."""
        if bias is None or not self.names:
            return bias
        return jnp.where(lax.axis_index(self.names) == 0, bias, jnp.zeros_like(bias))

    def _gather(self, x: jax.Array) -> jax.Array:
        return lax.all_gather(self._own(x), self.names, tiled=True)

    def _own(self, x: jax.Array) -> jax.Array:
        """x as each device's own: its gradient is summed over the axis, here and not further on."""
        missing = tuple(name for name in self.names if name not in _varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x


def _varying(x: jax.Array) -> frozenset[str]:
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def check_inner(where: str, w2: Any, recipe: str, form: ExpertForm, devices: int, parts: int = 1) -> None:
    """Refuses an inner size of w2 that the devices of the axis do not divide, or that scales do not fit.

    parts: in how many pieces w2 is to be cut; 1: it has been cut.
    """
    inner = w2.shape[-1 if form.weight_layout == "nk" else -2]
    if inner % parts:
        raise ValueError(
            f"{where}: an inner size of {inner} over {devices} devices of tensor_axis, need a multiple. "
            f"{_way_out(inner, devices, 1)}"
        )
    if devices > 1 and recipe == "fp8" and (inner // parts) % SCALE_BLOCK:
        whole = inner // parts * devices
        raise ValueError(
            f"{where}: an inner size of {whole} over {devices} devices of tensor_axis is {inner // parts} on "
            f"each, and recipe is 'fp8', need a multiple of {SCALE_BLOCK} on each, which a scale covers. "
            f"{_way_out(whole, devices, SCALE_BLOCK)}, or recipe='bf16'."
        )


def _way_out(inner: int, devices: int, step: int) -> str:
    padded = -(-inner // (devices * step)) * devices * step
    return (
        f"Pad gate, up and the down projection by zeros to an inner size of {padded}, which changes nothing, "
        "or cut it over fewer devices"
    )


# Whole weights, as shard_map takes them


class Pieces(NamedTuple):
    """An argument's arrays, how each is cut, and the argument of the pieces that one device gets."""

    arrays: list[jax.Array]
    specs: list[P]
    argument: Callable[[Sequence[jax.Array]], Any]


@dataclass(frozen=True)
class Cutter:
    """Cuts the arguments of a layer.

    Attributes:
      where: the layer, for errors.
      form: of its experts.
      experts: mesh axes of the experts.
      tensor: mesh axes of the inner size.
    """

    where: str
    form: ExpertForm
    experts: tuple[str, ...]
    tensor: tuple[str, ...]

    def weight(self, name: str, w: Any) -> Pieces:
        """The weight of this name, [e, .., ..]."""
        rows = (name == "w13") == (self.form.weight_layout == "nk")
        arrays, tree = jax.tree.flatten(w)
        dims = [dim for one in (w if isinstance(w, tuple | list) else [w]) for dim in _inner_dims(one, rows)]
        halves = name == "w13" and self._has_halves(w)
        if halves:
            arrays = [self._apart(name, x, x.ndim + dim) for x, dim in zip(arrays, dims, strict=True)]
        specs = [self._spec(x.ndim, dim) for x, dim in zip(arrays, dims, strict=True)]

        def argument(pieces: Sequence[jax.Array]) -> Any:
            whole = [_together(x, x.ndim + dim) if halves else x for x, dim in zip(pieces, dims, strict=True)]
            return jax.tree.unflatten(tree, whole)

        return Pieces(arrays, specs, argument)

    def bias(self, b13: jax.Array | None) -> Pieces:
        """b13 [e, 2 * i], cut as w13 is."""
        if b13 is None:
            return Pieces([], [], lambda _: None)
        halves = self._has_halves(None)
        array = self._apart("b13", b13, 1) if halves else b13
        spec = self._spec(array.ndim, -1)
        return Pieces([array], [spec], lambda pieces: _together(pieces[0], 2) if halves else pieces[0])

    def shared(self, shared: SharedExperts | None) -> Pieces:
        """Weights cut along their inner size, like those of the experts."""
        if shared is None:
            return Pieces([], [], lambda _: None)
        whole, shared = Cutter(f"{self.where} (shared)", self.form, (), self.tensor), shared.stacked()
        parts = [
            whole.weight("w13", shared.w13),
            whole.weight("w2", shared.w2),
            whole.bias(shared.b13),
            *(_uncut(array) for array in (shared.b2, shared.gate)),
        ]
        ends = list(itertools.accumulate(len(part.arrays) for part in parts))

        def argument(pieces: Sequence[jax.Array]) -> SharedExperts:
            each = zip(parts, [0, *ends], ends, strict=False)
            return SharedExperts(*(part.argument(pieces[start:end]) for part, start, end in each))

        arrays = [array for part in parts for array in part.arrays]
        specs = [spec for part in parts for spec in part.specs]
        return Pieces(arrays, specs, argument)

    def _has_halves(self, w: Any) -> bool:
        """Whether gate and up are halves of one dimension, which both are cut."""
        act, one = self.form.act, not isinstance(w, tuple | list) and getattr(w, "ndim", 3) == 3
        return bool(self.tensor) and act.gated and not act.interleaved and one

    def _spec(self, rank: int, dim: int) -> P:
        dims: list[tuple[str, ...]] = [()] * rank
        dims[0], dims[rank + dim] = self.experts, self.tensor
        return as_spec(dims)

    def _apart(self, name: str, x: jax.Array, at: int) -> jax.Array:
        """[.., 2 * i, ..] as [.., 2, i, ..]."""
        if cuts(x)[at]:
            raise ValueError(
                f"{self.where}: {name} is {list(x.shape)}, gate and up joined, and its dimension {at} is cut "
                f"over {cuts(x)[at]} of the mesh: the first devices have gates, the last ones ups. Store w13 "
                "so that each device has both: [e, 2, i, h] with i cut, or two arrays, w13=(gate, up), or in "
                "turns (Activation(interleaved=True)); b13 whole."
            )
        return x.reshape(*x.shape[:at], 2, x.shape[at] // 2, *x.shape[at + 1 :])


def _together(x: jax.Array, at: int) -> jax.Array:
    """The inverse of `_apart`; at: the second of its two dimensions."""
    return x.reshape(*x.shape[: at - 1], 2 * x.shape[at], *x.shape[at + 1 :])


def _uncut(array: jax.Array | None) -> Pieces:
    if array is None:
        return Pieces([], [], lambda _: None)
    return Pieces([array], [P()], lambda pieces: pieces[0])


def _inner_dims(w: Any, rows: bool) -> list[int]:
    """For each array of a weight, which of its dimensions is the inner size, from the end."""
    dim, turned = (-2, -1) if rows else (-1, -2)
    if isinstance(w, PreparedWeight):
        return [dim, dim, dim, turned, turned]
    if isinstance(w, PreparedFp4):
        return [dim - 1]  # behind rows and columns of slabs, their bytes
    return [dim] * len(jax.tree.leaves(w))
