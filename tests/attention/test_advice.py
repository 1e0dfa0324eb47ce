"""Messages of jax_deepgemm.attention: a refused call, what it says, and calls after that advice."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_deepgemm.attention import (
    KVCache,
    PagedKVCache,
    attend_with_cache,
    paged_append,
    ragged_paged_attention,
)

pytestmark = pytest.mark.any_version

E4M3, BF16 = jnp.float8_e4m3fn, jnp.bfloat16
CREATE = functools.partial(PagedKVCache.create, 2, 16, 2)
CACHE, STACKED, FP8 = CREATE(32), CREATE(32, layers=3), CREATE(32, E4M3)
K, Q, F32 = jnp.zeros((4, 2, 32), BF16), jnp.zeros((4, 6, 32), BF16), jnp.zeros((4, 6, 32))
AT, FREQ = jnp.zeros(4, jnp.int32), jnp.ones(16)
put = functools.partial(paged_append, slots=AT)
see = functools.partial(
    ragged_paged_attention,
    block_tables=jnp.zeros((2, 1), int),
    cu_q_lens=jnp.arange(3),
    kv_lens=jnp.ones(2, int),
)
SLOTS = KVCache.create(2, 16, 2, 32)
ROW = jnp.zeros((2, 9, 2, 32), BF16)

ADVICE: dict[str, tuple[Any, str, tuple[Any, ...]]] = {
    "fp8 tokens": (lambda: put(CACHE, K.astype(E4M3), K), "k.astype", (lambda: put(FP8, K, K),)),
    "types differ": (
        lambda: put(CACHE, K, K.astype(jnp.float32)),
        r"v.astype\('bfloat16'\)",
        (lambda: put(CACHE, K, K.astype("bfloat16")),),
    ),
    "a batch": (
        lambda: put(CACHE, K[None], K[None]),
        r"k.reshape\(-1, \*k.shape\[-2:\]\)",
        (lambda: put(CACHE, *[K[None].reshape(-1, *K.shape[-2:])] * 2),),
    ),
    "layer": (
        lambda: put(CACHE, K, K, layer=0),
        "leave layer out",
        (lambda: put(CACHE, K, K), lambda: put(STACKED, K, K, layer=0)),
    ),
    "no layer": (lambda: see(Q, STACKED), "need 0 to 2: say layer=", (lambda: see(Q, STACKED, layer=2),)),
    "q alone": (
        lambda: put(CACHE, K, K, q=Q),
        "Give both, or neither",
        (lambda: put(CACHE, K, K, q=Q, rotary=(AT, FREQ)), lambda: put(CACHE, K, K)),
    ),
    "heads": (
        lambda: CREATE(40),
        r"Pad heads with zeros, 8 here, and give scale= of the size without them",
        (lambda: see(jnp.pad(Q[..., :24], ((0, 0), (0, 0), (0, 8))), CACHE, scale=24**-0.5),),
    ),
    "scales": (
        lambda: CREATE(32, k_scale=2.0),
        "Leave them out",
        (lambda: CREATE(32), lambda: CREATE(32, E4M3, k_scale=2.0)),
    ),
    "float32 q": (
        lambda: see(F32, CACHE),
        r"q.astype\('bfloat16'\)",
        (lambda: see(F32.astype("bfloat16"), CACHE), lambda: see(F32.astype("float16"), FP8)),
    ),
    "window": (
        lambda: see(Q, CACHE, window=4, causal=False),
        "causal=True",
        (lambda: see(Q, CACHE, window=4),),
    ),
    "sinks": (
        lambda: see(Q, CACHE, sinks=jnp.zeros(6, BF16)),
        r"sinks.astype\(jnp.float32\)",
        (lambda: see(Q, CACHE, sinks=jnp.zeros(6)),),
    ),
    "no room": (
        lambda: attend_with_cache(ROW, SLOTS, 8, ROW, ROW),
        "Create the cache with more capacity",
        (lambda: attend_with_cache(ROW, KVCache.create(2, 17, 2, 32), 8, ROW, ROW),),
    ),
    "k alone": (
        lambda: attend_with_cache(ROW, SLOTS, 0, ROW),
        "k and v go together",
        (lambda: attend_with_cache(ROW, SLOTS, 0, ROW, ROW), lambda: attend_with_cache(ROW, SLOTS, 9)),
    ),
}


@pytest.mark.parametrize("name", ADVICE)
def test_advice_works(name: str) -> None:
    refused, says, calls = ADVICE[name]
    with pytest.raises((TypeError, ValueError), match=says):
        refused()
    for call in calls:
        jax.eval_shape(call)
