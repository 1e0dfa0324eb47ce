"""From an op's jvp and transpose rules, written for plain arrays, to those of its primitive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad
from jax.sharding import PartitionSpec

from jax_deepgemm.core.batch import over_levels
from jax_deepgemm.core.declaration import Declaration
from jax_deepgemm.core.dtypes import wider
from jax_deepgemm.core.sharding import Axes, Batch, as_spec, entries


@dataclass(frozen=True)
class Wanted:
    """An operand whose cotangent a transpose rule computes.

    Attributes:
      shape: its shape, without vmap's dimensions.
      dtype: its dtype, which the cotangent has too.
      out_sharding: the cotangent's sharding on Explicit axes, else None; pass it to the op that computes the
        cotangent.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    out_sharding: PartitionSpec | None


def same_varying_axes(arrays: Sequence[Any]) -> list[jax.Array]:
    """Inside shard_map: makes all operands vary over the union of their axes.

    Every public function with a custom_vjp does this before it, so that the gradient of a replicated weight
    is summed.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset().union(*varying)
    return [
        lax.pcast(x, tuple(sorted(union - own)), to="varying") if union - own else x
        for x, own in zip(arrays, varying, strict=True)
    ]


def jvp_rule(
    op: Declaration,
    bind: Callable[..., Any],
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    batch: Batch,
    **params: Any,
) -> Any:
    """The jvp of the primitive that `bind` binds: the op's rule under the recorded vmap levels."""
    if op.jvp is None:
        raise NotImplementedError(f"{op.name} has no derivative. {op.grad_hint}".rstrip())
    results = bind(*primals, batch=batch, **params)
    live = [i for i, tangent in enumerate(tangents) if not _is_zero(tangent)]
    count = len(primals)
    rule = op.jvp

    def apply(*arrays: jax.Array) -> list[jax.Array]:
        given = dict(zip(live, arrays[count:], strict=True))
        return list(rule(list(arrays[:count]), [given.get(i) for i in range(count)], **params))

    carried = [tuple(level[i] for level in batch) for i in [*range(count), *live]]
    arrays = [*primals, *(tangents[i] for i in live)]
    return results, _over_levels(apply, arrays, carried, results[0])


def transpose_rule(
    op: Declaration, cotangents: Sequence[Any], *operands: Any, batch: Batch, **params: Any
) -> list[Any]:
    """The primitive's transpose: the op's rule for the unknown operands, summed over levels they lack."""
    params.pop("out_sharding", None)
    given = [ad.instantiate_zeros(ct) if isinstance(ct, ad.Zero) else ct for ct in cotangents]
    unknown = [i for i, operand in enumerate(operands) if ad.is_undefined_primal(operand)]
    found = dict(zip(unknown, _cotangents(op, unknown, given, operands, batch, params), strict=True))
    return [found.get(i) for i in range(len(operands))]


def _cotangents(
    op: Declaration,
    unknown: Sequence[int],
    cotangents: Sequence[jax.Array],
    operands: Sequence[Any],
    batch: Batch,
    params: dict[str, Any],
) -> list[jax.Array]:
    known = [i for i in range(len(operands)) if i not in unknown]
    wanted = {i: _wanted(operands[i].aval, sum(level[i] for level in batch)) for i in unknown}

    def apply(*arrays: jax.Array) -> list[jax.Array]:
        inputs = {**wanted, **dict(zip(known, arrays[len(cotangents) :], strict=True))}
        ordered = [inputs[i] for i in range(len(operands))]
        return op.cotangents(list(arrays[: len(cotangents)]), ordered, unknown, **params)

    every = (True,) * len(batch)
    carried = [every] * len(cotangents) + [tuple(level[i] for level in batch) for i in known]
    found = _over_levels(apply, [*cotangents, *(operands[i] for i in known)], carried, cotangents[0])
    return [
        _like_the_operand(each, operands[i].aval, [level for level, on in enumerate(batch) if not on[i]])
        for i, each in zip(unknown, found, strict=True)
    ]


def _like_the_operand(each: jax.Array, aval: Any, shared: Sequence[int]) -> jax.Array:
    """A cotangent with all levels, as that of an operand that lacks the shared ones."""
    if shared:
        each = jnp.sum(each, axis=shared, dtype=wider(each.dtype)).astype(aval.dtype)
    return jax.sharding.reshard(each, aval.sharding) if aval.sharding.mesh.explicit_axes else each


def _wanted(aval: Any, levels: int) -> Wanted:
    explicit = bool(aval.sharding.mesh.explicit_axes)
    spec = as_spec(entries(aval.sharding.spec, aval.ndim)[levels:]) if explicit else None
    return Wanted(tuple(aval.shape[levels:]), np.dtype(aval.dtype), spec)


def _over_levels(function: Any, arrays: list[Any], carried: list[tuple[bool, ...]], result: Any) -> Any:
    """vmap over recorded levels; on Explicit axes all arrays are first cut along them as the result is."""
    levels = len(carried[0]) if carried else 0
    if not levels:
        return function(*arrays)
    aval = jax.typeof(result)
    if aval.sharding.mesh.explicit_axes:
        cuts = entries(aval.sharding.spec, aval.ndim)[:levels]
        arrays = [_recut(array, on, cuts) for array, on in zip(arrays, carried, strict=True)]
    recorded = tuple(tuple(on[level] for on in carried) for level in range(levels))
    return over_levels(function, recorded)(*arrays)


def _recut(array: Any, carried: tuple[bool, ...], cuts: Sequence[Axes]) -> Any:
    aval = jax.typeof(array)
    lead = [cut for cut, on in zip(cuts, carried, strict=True) if on]
    taken = {axis for cut in lead for axis in cut}
    rest = [
        tuple(a for a in axes if a not in taken)
        for axes in entries(aval.sharding.spec, aval.ndim)[len(lead) :]
    ]
    return jax.sharding.reshard(array, as_spec([*lead, *rest]))


def _is_zero(tangent: Any) -> bool:
    return tangent is None or isinstance(tangent, ad.Zero)
