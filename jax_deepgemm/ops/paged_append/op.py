"""Writing tokens to pages as ops. Heads and pages are cut over devices freely; tokens are whole.

paged_append          k [t g d], v [t g v], slots [t], the cache, its scales, layer [1]   -> the cache
paged_append_rotary   the same, positions [t], inv_freq [r]
paged_append_query    the same, q [t g n d]                                               -> and q, turned

The cache is written to in place.
"""

from __future__ import annotations

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
_QUERY = f"{_ROTARY}, t g n d"
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


def _op(name: str, rule: str, results: str) -> Op:
    return Op(
        name,
        f"{rule} -> {results}",
        _result,
        reference.append,
        blocks=_WHOLE,
        spmd=_own_slots,
        kernel=LazyKernel("jax_deepgemm.ops.paged_append.kernel", "append"),
        aliases={3: 0, 4: 1},
        grad_hint="A cache is for serving; to train, attend to keys and values themselves, as "
        "jax.nn.dot_product_attention does.",
    )


APPEND = _op("paged_append", _PLAIN, _PAGES)
APPEND_ROTARY = _op("paged_append_rotary", _ROTARY, _PAGES)
APPEND_QUERY = _op("paged_append_query", _QUERY, f"{_PAGES}, t g n d")
