"""Latent attention as two ops.

    paged_mla_attention    q [t h d], cache [l p s d], tables [b n], cu_q_lens [c], kv_lens [b], layer [1]
    sparse_mla_attention   q [t h d], cache [l p s d], slots [t n], layer [1]
                           -> out [t h v] in out_dtype, lse [t h] float32

Key and value of a token are one row of the cache, which all heads read; the value is its first v numbers.

Static: out_dtype (of q), v_head_dim (v), scale; of the first causal, max_q_len (0: unknown) and split (0: the
kernel chooses).

Data that is known on the device alone cannot leave an array: keys of pages or slots outside of the cache, or
of a layer outside of it, are not seen; kv_lens are held to [0, n s], cu_q_lens to [0, t], where a smaller one
than the last gives a sequence no rows. Rows that see no key, that belong to no sequence, or that are row
max_q_len of theirs or a later one are 0, and their lse is minus infinity.

Heads are cut over devices, and tokens of the second too; the cache is whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jax_deepgemm.core.declaration import Dims
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.ops.mla import reference

_HINT = (
    "Attention to a cache is for serving; to train, expand latents to keys and values and attend to these, "
    "as jax.nn.dot_product_attention does."
)


def _result(q: Dims, *_: Dims, out_dtype: Any, v_head_dim: int, **__: Any) -> list[tuple[Dims, Any]]:
    return [((*q[:-1], v_head_dim), out_dtype), (q[:-1], np.dtype(np.float32))]


def _op(name: str, rule: str, whole: str, run: Any, kernel: str) -> Op:
    return Op(
        name,
        f"{rule} -> t h v, t h",
        _result,
        run,
        blocks=dict.fromkeys(whole.split(), ("o", 1)),  # cut where `o` is: never
        kernel=LazyKernel("jax_deepgemm.ops.mla.kernel", kernel),
        grad_hint=_HINT,
    )


PAGED = _op("paged_mla_attention", "t h d, l p s d, b n, c, b, o", "t v", reference.paged, "paged")
SPARSE = _op("sparse_mla_attention", "t h d, l p s d, t n, o", "v", reference.sparse, "sparse")
