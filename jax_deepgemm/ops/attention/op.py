"""Attention of ragged sequences to keys in pages, as one op.

    q [t g r d], k [l p g s d], v [l p g s v], k_scale, v_scale [l g], tables [b n], cu_q_lens [c],
    kv_lens [b], layer [1], sinks [g r], slopes [g r]   ->   out [t g r v] in out_dtype, lse [t g r] float32

Head h of a token is [g, r] = [h // group, h % group] and reads head g of the cache. Kernels see q [t h d],
sinks [h] and slopes [h] (`prepare`), and results in the same order of bytes.

Static: out_dtype (of q), group (r), scale, causal, window (0: none), softcap (0.0: none), with_sinks,
with_slopes (whether they are read; zeros else), max_q_len (0: unknown), split (0: the kernel chooses).

Data that is known on the device alone cannot leave an array: keys of pages outside of the cache, or of a
layer outside of it, are not seen; kv_lens are held to [0, n s], cu_q_lens to [0, t], where a smaller one than
the last gives a sequence no rows. Rows that see no key, that belong to no sequence, or that are row max_q_len
of theirs or a later one are 0, and their lse is minus infinity, or the sink.

Heads are cut over devices, those of q with those of the cache that they read.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jax_deepgemm.core.declaration import Dims
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import ShardingPlan
from jax_deepgemm.ops.attention import reference

_RULE = "t g r d, l p g s d, l p g s v, l g, l g, b n, c, b, o, g r, g r -> t g r v, t g r"
_WHOLE = dict.fromkeys(("t", "v"), ("o", 1))
"""Cut where `o` is, along which no result asks for a cut: never."""


def _result(q: Dims, k: Dims, v: Dims, *_: Dims, out_dtype: Any, **__: Any) -> list[tuple[Dims, Any]]:
    return [((*q[:-1], v[-1]), out_dtype), (q[:-1], np.dtype(np.float32))]


def _recut(plan: ShardingPlan, *arrays: jax.Array, **_: Any) -> tuple[list[jax.Array], dict[str, Any]]:
    """A device has some heads of a group where there are more devices than heads of the cache."""
    return list(arrays), {"group": plan.local_size("r")}


def prepare(q: jax.Array, *rest: jax.Array, **_: Any) -> tuple[jax.Array, ...]:
    """Operands as kernels see them: heads of q in one dimension. There may be one of vmap in front."""
    *others, sinks, slopes = rest
    q = q.reshape(*q.shape[:-3], -1, q.shape[-1])
    return (q, *others, *(x.reshape(*x.shape[:-2], -1) for x in (sinks, slopes)))


ATTENTION = Op(
    "ragged_paged_attention",
    _RULE,
    _result,
    reference.ragged_paged,
    blocks=_WHOLE,
    recut=_recut,
    kernel_prepare=prepare,
    grad_hint="Attention to a cache is for serving; to train, attend to keys and values themselves, as "
    "jax.nn.dot_product_attention does.",
)
