"""Writing tokens to pages as ops. Heads and pages are cut over devices freely; tokens are whole.

paged_append          k [t g d], v [t g v], slots [t], the cache, its scales, layer [1]   -> the cache
paged_append_rotary   the same, positions [t], inv_freq [r]
paged_append_query    the same, q [t h d]                                                 -> and q, turned

The cache is written to in place. A cut that parts heads of q which share one of the cache is dropped.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.declaration import Dims
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import ShardingPlan
from jax_deepgemm.ops.paged_append import reference

_PAGES = "l p g s d, l p g s v"
_PLAIN = f"t g d, t g v, t, {_PAGES}, l g, l g, o"
_ROTARY = f"{_PLAIN}, t, r"
_QUERY = f"{_ROTARY}, t h d"
_KINDS = {
    "plain": ("paged_append", _PLAIN),
    "rotary": ("paged_append_rotary", _ROTARY),
    "query": ("paged_append_query", _QUERY),
}
_WHOLE = dict.fromkeys(("t", "d", "v", "l", "s"), ("o", 1))
"""Cut where `o` is, along which no result asks for a cut: never."""


def _result(*shapes: Dims, dtypes: tuple[np.dtype, ...], **_: Any) -> list[tuple[Dims, Any]]:
    return list(zip((shapes[3], shapes[4], *shapes[10:]), dtypes, strict=True))


def _own_slots(plan: ShardingPlan, local: Any, *arrays: jax.Array) -> Any:
    """Slots of other devices' pages are outside of this one's."""
    if not plan.cut("p"):
        return arrays, None
    k_new, v_new, slots, k, *rest = arrays
    moved = slots - plan.offset("p") * k.shape[-2]
    return (k_new, v_new, jnp.where(slots < 0, -1, moved), k, *rest), None


@functools.cache
def append_op(kind: str = "plain", group: int = 1) -> Op:
    """Returns the op that does no more than write ("plain"), that turns keys ("rotary"), or queries, too.

    Args:
      kind: "plain", "rotary" or "query".
      group: of queries, heads for each of the cache: cut over devices with it.
    """
    name, rule = _KINDS[kind]
    with_q = {"blocks": {"g": ("h", group), **_WHOLE}, "edges": ("g",), "leads": ("g",)}
    return Op(
        name,
        f"{rule} -> {_PAGES}" + ", t h d" * (kind == "query"),
        _result,
        reference.append,
        spmd=_own_slots,
        kernel=LazyKernel("jax_deepgemm.ops.paged_append.kernel", "append"),
        aliases={3: 0, 4: 1},
        grad_hint="A cache is for serving; to train, attend to keys and values themselves, as "
        "jax.nn.dot_product_attention does.",
        **(with_q if kind == "query" else {"blocks": _WHOLE}),
    )
