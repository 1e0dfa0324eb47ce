"""An indexer's rows in FP8 as ops. Tokens and heads are cut freely, a row is whole.

quantize   x [m, h, d]                  -> values [m, h, d], scales [m, h, 1]
cache      x [n, d], slots [n], cache   -> the cache, in place; its pages are cut freely, rows are whole
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import ShardingPlan
from jax_deepgemm.ops.indexer_quantize import reference

_HINT = "Train an indexer with bf16_mqa_logits, and hadamard where its rows are rotated."
_KERNEL = "jax_deepgemm.ops.indexer_quantize.kernel"

QUANTIZE = Op(
    "indexer_quantize",
    "m h e -> m h d, m h s",
    lambda x, **_: [(x, reference.E4M3), ((*x[:-1], 1), np.dtype(np.float32))],
    reference.quantize,
    blocks={"d": ("e", 1), "s": ("e", 1)},  # cut where x is, along a dimension that no result asks for: never
    kernel=LazyKernel(_KERNEL, "quantize"),
    grad_hint=_HINT,
)


def _own_slots(page: Callable[..., int]) -> Callable[..., Any]:
    """The `spmd` of ops on a cache: slots of other devices' pages are outside of this one's."""

    def on_shard(plan: ShardingPlan, local: Any, x: Any, slots: jax.Array, *cache: jax.Array) -> Any:
        if plan.cut("p"):
            moved = slots - plan.offset("p") * page(x, *cache)
            slots = jnp.where(slots < 0, -1, moved)
        return (x, slots, *cache), None

    return on_shard


TO_ARRAYS = Op(
    "indexer_quantize_to_arrays",
    "n e, n, p b f, p c -> p b f, p c",
    lambda x, slots, values, scales, **_: [(values, reference.E4M3), (scales, np.dtype(np.float32))],
    reference.to_arrays,
    spmd=_own_slots(lambda x, values, scales: values.shape[-2]),
    kernel=LazyKernel(_KERNEL, "to_arrays"),
    aliases={2: 0, 3: 1},
    grad_hint=_HINT,
)
TO_BYTES = Op(
    "indexer_quantize_to_bytes",
    "n e, n, p b -> p b",
    lambda x, slots, cache, **_: [(cache, np.dtype(np.uint8))],
    reference.to_bytes,
    spmd=_own_slots(lambda x, cache: cache.shape[-1] // (x.shape[-1] + 4)),
    kernel=LazyKernel(_KERNEL, "to_bytes"),
    aliases={2: 0},
    grad_hint=_HINT,
)
