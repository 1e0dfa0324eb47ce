"""What attention to a cache checks while tracing."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.ops.paged_append.cache import BFLOAT16, E4M3, FLOAT16, PagedKVCache
from jax_deepgemm.ops.paged_append.checks import (
    FLOAT32,
    LARGEST,
    array,
    describe,
    integers,
    positive,
    shaped,
    wrong,
)

SPLIT_STEP = 256
"""Keys: whole rounds of every kernel."""


def query(where: str, q: Any, cache: PagedKVCache, rank: str = "[t, heads, head_dim]") -> jax.Array:
    """q, of a dtype and heads that fit the cache."""
    x = unwrapped(q)
    allowed = (BFLOAT16, FLOAT16) if cache.dtype == E4M3 else (cache.dtype,)
    if getattr(x, "dtype", None) not in allowed:
        known = " or ".join(one.name for one in allowed)
        need = f"{known}, as the cache is {cache.dtype.name}"
        wrong(where, "q", x, need, f"Convert it: q.astype({allowed[0].name!r}).")
    x = jnp.asarray(x)
    if x.ndim != rank.count(",") + 1 or x.shape[-1] != cache.head_dim:
        raise ValueError(
            f"{where}: q is {describe(x)}, need {rank}, head_dim {cache.head_dim} as the cache has."
        )
    heads = x.shape[-2]
    if heads < 1 or heads % cache.kv_heads:
        raise ValueError(
            f"{where}: q has {heads} heads and the cache {cache.kv_heads}, need a multiple of them: so many "
            "heads of q share one."
        )
    return x


def batch(
    where: str, tables: Any, cu_q_lens: Any, kv_lens: Any, num_seqs: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tables [s, p], cu_q_lens [s + 1], kv_lens [s]; those from num_seqs on have no rows."""
    shape = np.shape(unwrapped(tables))
    if len(shape) != 2:
        raise ValueError(
            f"{where}: block_tables are {describe(unwrapped(tables))}, need integers [s, p]: the pages of "
            "each sequence."
        )
    count = shape[0]
    why = f"block_tables have {count} sequences"
    pages = integers(where, "block_tables", tables, tuple(shape), "")
    starts = integers(where, "cu_q_lens", cu_q_lens, (count + 1,), f"{why}, and rows end behind the last.")
    lens = integers(where, "kv_lens", kv_lens, (count,), f"{why}.")
    if num_seqs is None:
        return pages, starts, lens
    given = unwrapped(num_seqs)
    if isinstance(given, (int, np.integer)) and not isinstance(given, bool):
        if not 0 <= given <= count:
            raise ValueError(f"{where}: num_seqs is {given}, need 0 to {count}: {why}.")
        given = int(given)
        return pages[:given], starts[: given + 1], lens[:given]
    number = integers(where, "num_seqs", given, (), "a number.")
    at = jnp.arange(count + 1, dtype=jnp.int32)
    end = starts[jnp.clip(number, 0, count)]
    return pages, jnp.where(at > number, end, starts), jnp.where(at[:-1] < number, lens, 0)


def options(
    where: str,
    *,
    causal: Any,
    window: Any,
    softcap: Any,
    scale: Any,
    max_q_len: Any,
    split: Any,
    head_dim: int,
) -> dict[str, Any]:
    """Static parameters of the op."""
    if not isinstance(causal, bool):
        raise TypeError(f"{where}: causal is {causal!r}, need True or False.")
    if window is not None:
        positive(where, "window", window)
        if not causal:
            raise ValueError(
                f"{where}: window is {window} and causal is False; a window is of the last keys up to a "
                "token's own, so it needs causal=True."
            )
    if split != "auto":
        positive(where, "split", split)
        if split % SPLIT_STEP:
            raise ValueError(
                f"{where}: split is {split}, need 'auto' or a multiple of {SPLIT_STEP} keys, such as "
                f"{-(-split // SPLIT_STEP) * SPLIT_STEP}."
            )
    return {
        "causal": causal,
        "window": 0 if window is None else int(window),
        "softcap": 0.0 if softcap is None else _number(where, "softcap", softcap),
        "scale": head_dim**-0.5 if scale is None else _number(where, "scale", scale),
        "max_q_len": 0 if max_q_len is None else min(positive(where, "max_q_len", max_q_len), LARGEST),
        "split": 0 if split == "auto" else min(int(split), LARGEST // SPLIT_STEP * SPLIT_STEP),
    }


def per_head(where: str, name: str, given: Any, heads: int) -> tuple[jax.Array, bool]:
    """float32 [heads], zeros where nothing is given, and whether it was."""
    if given is None:
        return jnp.zeros(heads, jnp.float32), False
    x = array(where, name, given, FLOAT32, "float32 [heads]", f"Convert it: {name}.astype(jnp.float32).")
    return shaped(where, name, x, (heads,), "one for each head of q."), True


def _number(where: str, name: str, given: Any) -> float:
    known = isinstance(given, (int, float, np.integer, np.floating)) and not isinstance(given, bool)
    if not known or not (0 < given < math.inf):
        raise ValueError(f"{where}: {name} is {given!r}, need a positive number, known while tracing.")
    return float(given)
