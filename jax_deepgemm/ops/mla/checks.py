"""What functions of latent attention check while tracing."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.ops.attention import checks
from jax_deepgemm.ops.paged_append.cache import BFLOAT16, FLOAT16, PAGE_SIZES
from jax_deepgemm.ops.paged_append.checks import describe, integers, layer_index, wrong

_RANK = "[pages, page_size, head_dim], or [layers, pages, page_size, head_dim] with layer="


class Latents(NamedTuple):
    """A cache, always with layers, and the index of one."""

    rows: jax.Array
    stacked: bool
    layer: jax.Array

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.rows.shape[2]

    @property
    def slots(self) -> int:
        """Tokens of a layer."""
        return self.rows.shape[1] * self.rows.shape[2]


class _Layers(NamedTuple):
    stacked: bool
    layers: int


def latents(where: str, cache: Any, layer: Any) -> Latents:
    """The cache, checked."""
    x = unwrapped(cache)
    if getattr(x, "dtype", None) not in (BFLOAT16, FLOAT16):
        way_out = "Make it: jnp.zeros((pages, page_size, 576), jnp.bfloat16)."
        wrong(where, "cache", x, "bfloat16 or float16", way_out)
    x = jnp.asarray(x)
    if x.ndim not in (3, 4):
        raise ValueError(f"{where}: cache is {describe(x)}, need {_RANK}.")
    stacked = x.ndim == 4
    rows = x if stacked else x[None]
    if rows.shape[2] not in PAGE_SIZES:
        known = ", ".join(map(str, PAGE_SIZES))
        raise ValueError(f"{where}: page_size is {rows.shape[2]}, need one of {known}: cache is {_RANK}.")
    return Latents(rows, stacked, layer_index(where, _Layers(stacked, rows.shape[0]), layer))


def query(where: str, q: Any, cache: Latents) -> jax.Array:
    """q [t, heads, head_dim], as the cache is."""
    x, kind, depth = unwrapped(q), np.dtype(cache.rows.dtype), cache.rows.shape[-1]
    if getattr(x, "dtype", None) != kind:
        wrong(where, "q", x, f"{kind.name}, as the cache is", f"Convert it: q.astype({kind.name!r}).")
    x = jnp.asarray(x)
    if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != depth:
        raise ValueError(f"{where}: q is {describe(x)}, need [t, heads, {depth}], head_dim as the cache has.")
    return x


def options(where: str, cache: Latents, v_head_dim: Any, scale: Any, split: Any = "auto") -> dict[str, Any]:
    """Static parameters that both ops have. A scale of key and value cannot be guessed: it is of heads before
    they were absorbed."""
    depth = cache.rows.shape[-1]
    known = isinstance(v_head_dim, (int, np.integer)) and not isinstance(v_head_dim, bool)
    if not known or not 1 <= v_head_dim <= depth:
        raise ValueError(
            f"{where}: v_head_dim is {v_head_dim!r}, need 1 to head_dim = {depth}: the value is the first "
            "numbers of the key."
        )
    if scale is None:
        raise ValueError(
            f"{where}: scale is None, need a number: of DeepSeek's models 192 ** -0.5, by heads before they "
            "are absorbed, times what YaRN adds."
        )
    rest = checks.options(
        where,
        causal=True,
        window=None,
        softcap=None,
        scale=scale,
        max_q_len=None,
        split=split,
        head_dim=depth,
    )
    return {"v_head_dim": int(v_head_dim), "scale": rest["scale"], "split": rest["split"]}


def named_slots(where: str, indices: Any, tokens: int) -> jax.Array:
    """int32 [t, n]."""
    shape = np.shape(unwrapped(indices))
    if len(shape) != 2 or shape[1] < 1:
        raise ValueError(
            f"{where}: indices are {describe(unwrapped(indices))}, need integers [{tokens}, n], n >= 1: "
            "slots of the keys that each token sees, -1 for none."
        )
    return integers(where, "indices", indices, (tokens, shape[1]), "a row for each token of q.")
