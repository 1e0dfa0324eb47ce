"""Attention of ragged sequences to keys in pages, as one op.

    q [t h d], k [l p g s d], v [l p g s v], k_scale, v_scale [l g], tables [b n], cu_q_lens [c], kv_lens [b],
    layer [1], sinks [h], slopes [h]   ->   out [t h v] in out_dtype, lse [t h] float32

Head h of a token reads head h // group of the cache.

Static: out_dtype (of q), group (heads of q for each of the cache), scale, causal, window (0: none), softcap
(0.0: none), with_sinks, with_slopes (whether they are read; zeros else), max_q_len (0: unknown), split (0: as
is fast).

Data that is known on the device alone cannot leave an array: keys of pages outside of the cache, or of a
layer outside of it, are not seen; kv_lens are held to [0, n s], cu_q_lens to [0, t], where a smaller one than
the last gives a sequence no rows. Rows that see no key, that belong to no sequence, or that are row max_q_len
of theirs or a later one are 0, and their lse is minus infinity, or the sink.

Heads are cut over devices, those of q with those of the cache that they read; of either, where only one is
cut. A cut that parts heads which share one of the cache is dropped.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from jax_deepgemm.core.declaration import Dims
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.ops.attention import reference

_RULE = "t h d, l p g s d, l p g s v, l g, l g, b n, c, b, o, h, h -> t h v, t h"
_WHOLE = dict.fromkeys(("t", "v"), ("o", 1))
"""Cut where `o` is, along which no result asks for a cut: never."""


def _result(q: Dims, k: Dims, v: Dims, *_: Dims, out_dtype: Any, **__: Any) -> list[tuple[Dims, Any]]:
    return [((*q[:-1], v[-1]), out_dtype), (q[:-1], np.dtype(np.float32))]


@functools.cache
def attention_op(group: int) -> Op:
    """The op of so many heads of q for each of the cache."""
    return Op(
        "ragged_paged_attention",
        _RULE,
        _result,
        reference.ragged_paged,
        blocks={"g": ("h", group), **_WHOLE},
        edges=("g",),
        leads=("g",),
        kernel=LazyKernel("jax_deepgemm.ops.attention.kernel", "attention"),
        grad_hint="Attention to a cache is for serving; to train, attend to keys and values themselves, as "
        "jax.nn.dot_product_attention does.",
    )
