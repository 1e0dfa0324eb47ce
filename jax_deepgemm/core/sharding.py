"""How one call of an op is cut over a device mesh: a pure plan, made from shapes and specs, without devices.

A `ShardingRule` names every dimension of an op's operands and results, as in an einsum: "m k, n k -> m n".
Dimensions of the same name are cut together. `plan_sharding` takes the shapes and specs of one call and
decides, for each name, the mesh axes that cut it; the same plan serves Auto axes (the partition callback of
XLA) and Explicit axes (shard_map).

>>> rule = ShardingRule.parse("m k, n k -> m n", reduces=("k",))
>>> plan = plan_sharding(rule, shapes=[(8, 16), (4, 16)], specs=[[(), ("x",)], [(), ("x",)]],
...                      result_shapes=[(8, 4)], result_specs=[[(), ()]], mesh={"x": 2})
>>> plan.in_specs[0], plan.out_specs[0], plan.reduce_axes
(P(None, 'x'), P(None, None), ('x',))
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

Axes = tuple[str, ...]
Factors = tuple[str, ...]
Batch = tuple[tuple[bool, ...], ...]
"""For each vmap level, outermost first: which operands carry it."""


@dataclass(frozen=True)
class ShardingRule:
    """The names ("factors") of an op's dimensions, and what cutting each of them means.

    Attributes:
      operands: factors of each operand's dimensions.
      results: factors of each result's dimensions.
      reduces: factors that are summed over; partial results are summed across the mesh axes that cut them.
      blocks: factor of a grid of blocks -> (factor of the data, elements of the data per block). Blocks are
        global: the grid is cut where its data is, if every cut is at the edge of a block, and is whole
        otherwise.
      edges: grids at whose edges alone their data is cut; other cuts are dropped. Where no operand has the
        data itself, it is cut as the grid is.
      addend: index of an operand that is added to the first result (once, also when partial results are
        summed).
      leads: grids whose cut their data takes, where no result asks for a cut of that.
    """

    operands: tuple[Factors, ...]
    results: tuple[Factors, ...]
    reduces: Factors = ()
    blocks: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    addend: int | None = None
    edges: Factors = ()
    leads: Factors = ()

    @property
    def data_of(self) -> dict[str, str]:
        """Grid -> its data, of those that alone stand for it in the operands.

        >>> blocks = {"nb": ("n", 64), "kb": ("k", 128)}
        >>> rule = ShardingRule.parse("m k, nb kb -> m n", blocks=blocks, edges=("nb", "kb"))
        >>> rule.data_of
        {'nb': 'n'}
        """
        there = {name for factors in self.operands for name in factors}
        return {grid: self.blocks[grid][0] for grid in self.edges if self.blocks[grid][0] not in there}

    def step(self, name: str) -> int:
        """What a device's piece of a factor is a multiple of."""
        return math.lcm(*(self.blocks[grid][1] for grid in self.edges if self.blocks[grid][0] == name))

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        reduces: Sequence[str] = (),
        blocks: Mapping[str, tuple[str, int]] | None = None,
        addend: int | None = None,
        edges: Sequence[str] = (),
        leads: Sequence[str] = (),
    ) -> ShardingRule:
        """Reads "m k, n k -> m n"."""
        left, right = (tuple(tuple(one.split()) for one in side.split(",")) for side in text.split("->"))
        return cls(left, right, tuple(reduces), dict(blocks or {}), addend, tuple(edges), tuple(leads))

    def batched(self, batch: Batch) -> ShardingRule:
        """The rule under vmap: one more leading factor per level."""

        def levels(operand: int) -> Factors:
            return tuple(f"batch{i}" for i, carried in enumerate(batch) if carried[operand])

        every = tuple(f"batch{i}" for i in range(len(batch)))
        return ShardingRule(
            tuple(levels(i) + factors for i, factors in enumerate(self.operands)),
            tuple(every + factors for factors in self.results),
            self.reduces,
            self.blocks,
            self.addend,
            self.edges,
            self.leads,
        )

    def text(self) -> str:
        """The rule in the einsum-like notation, with names that Shardy's parser accepts."""
        return self.shardy()[0]

    def shardy(self) -> tuple[str, dict[str, int]]:
        """The rule as Shardy reads it, and the sizes of factors of compound ones: data that is cut as a grid.

        >>> form = {"reduces": ("k",), "blocks": {"nb": ("n", 64)}, "edges": ("nb",)}
        >>> ShardingRule.parse("m k, nb k -> m n", **form).shardy()
        ('m k, nb k -> m (nb n)', {'n': 64})
        """
        compound = {data: f"({grid} {data})" for grid, data in self.data_of.items()}
        sides = (
            ", ".join(" ".join(compound.get(name, name) for name in factors) for factors in side)
            for side in (self.operands, self.results)
        )
        return " -> ".join(sides), {data: self.step(data) for data in compound}

    def reduces_in_order(self) -> Factors:
        """`reduces` in order of first appearance, which Shardy's verifier asks for."""
        order = dict.fromkeys(name for factors in self.operands for name in factors)
        return tuple(name for name in order if name in self.reduces)


@dataclass(frozen=True)
class ShardingPlan:
    """What the sharding of one call is.

    Attributes:
      rule: the op's rule, with the factors of vmap.
      mesh: mesh axis -> size.
      size: factor -> global size.
      axes: factor -> mesh axes that cut it.
      in_specs: spec that each operand is brought to.
      out_specs: spec of each result.
      reduce_axes: mesh axes over which partial results are summed; empty if none.
      scatter_dim: dimension of the result that the sum is scattered over (reduce-scatter), or None
        (all-reduce).
    """

    rule: ShardingRule
    mesh: Mapping[str, int]
    size: Mapping[str, int]
    axes: Mapping[str, Axes]
    in_specs: tuple[PartitionSpec, ...]
    out_specs: tuple[PartitionSpec, ...]
    reduce_axes: Axes = ()
    scatter_dim: int | None = None

    def cut(self, factor: str) -> bool:
        """Whether the factor is divided over devices."""
        return bool(self.axes.get(factor))

    def shards(self, factor: str) -> int:
        """Number of pieces of the factor."""
        return math.prod(self.mesh[axis] for axis in self.axes.get(factor, ()))

    def local_size(self, factor: str) -> int:
        """Elements of the factor on one device."""
        return self.size[factor] // self.shards(factor)

    def offset(self, factor: str) -> jax.Array:
        """Global index of this device's first element of the factor; only inside the partitioned body."""
        piece = functools.reduce(
            lambda index, axis: index * self.mesh[axis] + lax.axis_index(axis),
            self.axes.get(factor, ()),
            jnp.int32(0),
        )
        return piece * jnp.int32(self.local_size(factor))


def entries(spec: PartitionSpec | None, rank: int) -> list[Axes]:
    """A spec as one tuple of axis names per dimension; no spec (inside a partial shard_map): replicated."""
    given = tuple(spec) if spec is not None else ()
    full = given + (None,) * (rank - len(given))
    return [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in full]


def as_spec(dims: Sequence[Axes]) -> PartitionSpec:
    """The inverse of `entries`."""
    return PartitionSpec(*[None if not axes else axes[0] if len(axes) == 1 else tuple(axes) for axes in dims])


def plan_sharding(
    rule: ShardingRule,
    shapes: Sequence[Sequence[int]],
    specs: Sequence[Sequence[Axes]],
    result_shapes: Sequence[Sequence[int]],
    result_specs: Sequence[Sequence[Axes]],
    mesh: Mapping[str, int],
) -> ShardingPlan:
    """Decides the cut of one call.

    Results decide for their own dimensions, operands for the summed ones. If the result asks for the very
    axes that cut the summed dimension, the sum is scattered. An axis is used once; a cut that does not divide
    its dimension is dropped (XLA would pad the shards with undefined data).

    Args:
      rule: factors, with those of vmap.
      shapes: global shapes of the operands.
      specs: mesh axes of each operand's dimensions, as `entries` gives them.
      result_shapes: global shapes of the results.
      result_specs: mesh axes asked of each result's dimensions.
      mesh: mesh axis -> size.
    """

    def pieces(axes: Axes) -> int:
        return math.prod(mesh[axis] for axis in axes)

    size = {
        name: extent
        for factors, shape in zip(rule.operands + rule.results, [*shapes, *result_shapes], strict=True)
        for name, extent in zip(factors, shape, strict=True)
    }
    given = _merge(rule, rule.operands, specs)
    asked = _merge(rule, rule.results, result_specs)
    summed = [name for name in rule.reduces if given.get(name)]
    for grid in rule.leads:
        data = rule.blocks[grid][0]
        asked[data] = asked.get(data) or _own_cut(rule, grid, specs)

    scatter_dim = None
    if len(summed) == 1 and size[summed[0]] % (pieces(given[summed[0]]) * rule.step(summed[0])) == 0:
        for dim, name in enumerate(rule.results[0]):
            if asked.get(name) and asked[name] == given[summed[0]] and size[name] % pieces(asked[name]) == 0:
                scatter_dim = dim
                asked[name] = ()
                break

    axes: dict[str, Axes] = {}
    used: set[str] = set()
    for name, wanted in [*asked.items(), *((name, given[name]) for name in summed)]:
        free = tuple(axis for axis in wanted if axis not in used)
        while free and size[name] % (pieces(free) * rule.step(name)):
            free = free[:-1]
        axes[name] = free
        used.update(free)
    for name, (data, step) in rule.blocks.items():
        cut = axes.get(data, ())
        axes[name] = cut if cut and (size[data] // pieces(cut)) % step == 0 else ()

    reduce_axes = tuple(axis for name in rule.reduces for axis in axes.get(name, ()))
    if not reduce_axes:
        scatter_dim = None

    def result_spec(factors: Factors) -> PartitionSpec:
        return as_spec([reduce_axes if d == scatter_dim else axes.get(f, ()) for d, f in enumerate(factors)])

    out_specs = tuple(result_spec(factors) for factors in rule.results)
    in_specs = [as_spec([axes.get(name, ()) for name in factors]) for factors in rule.operands]
    if rule.addend is not None:
        in_specs[rule.addend] = _addend_spec(rule, out_specs[0])
    return ShardingPlan(rule, dict(mesh), size, axes, tuple(in_specs), out_specs, reduce_axes, scatter_dim)


def _merge(rule: ShardingRule, dims: Sequence[Factors], specs: Sequence[Sequence[Axes]]) -> dict[str, Axes]:
    """Factor -> axes. The first cut dimension of a name wins; grids follow their data, or stand for it."""
    merged: dict[str, Axes] = {}
    for factors, spec in zip(dims, specs, strict=True):
        for factor, axes in zip(factors, spec, strict=True):
            name = rule.data_of.get(factor, factor)
            if name not in rule.blocks:
                merged[name] = merged.get(name) or axes
    return merged


def _own_cut(rule: ShardingRule, grid: str, specs: Sequence[Sequence[Axes]]) -> Axes:
    cuts = (
        axes
        for factors, spec in zip(rule.operands, specs, strict=True)
        for factor, axes in zip(factors, spec, strict=True)
        if factor == grid and axes
    )
    return next(cuts, ())


def _addend_spec(rule: ShardingRule, out_spec: PartitionSpec) -> PartitionSpec:
    """The addend is cut as the result it is added to, whatever the sum does."""
    assert rule.addend is not None
    result = dict(zip(rule.results[0], entries(out_spec, len(rule.results[0])), strict=True))
    return as_spec([result[name] for name in rule.operands[rule.addend]])


def pieces_of_whole(*names: str) -> Callable[..., Any]:
    """The `spmd` of an op that computes whole results on each device, which keeps the piece that is asked.

    Args:
      names: the results' dimensions for which that is so; the operands that they come from have others.
    """

    def on_shard(plan: ShardingPlan, local: Callable[..., Any], *arrays: jax.Array) -> Any:
        if not any(plan.cut(name) for name in names):
            return arrays, None
        results = zip(local(*arrays), plan.rule.results, strict=True)
        return None, [_piece(plan, x, factors, names) for x, factors in results]

    return on_shard


def _piece(plan: ShardingPlan, x: jax.Array, factors: Factors, names: Sequence[str]) -> jax.Array:
    for axis, name in enumerate(factors):
        if name in names and plan.cut(name):
            x = lax.dynamic_slice_in_dim(x, plan.offset(name), plan.local_size(name), axis=axis)
    return x
