"""PagedKVCache: the keys and values of many sequences, in pages that belong to any of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.sharding import as_spec, entries
from jax_deepgemm.ops.paged_append.checks import describe, positive

PAGE_SIZES = (16, 32, 64, 128, 256)
STEP = 16
"""Numbers of a head are a multiple of this."""
MOST_DIM = 256
"""Numbers of a head that kernels take."""
BFLOAT16, FLOAT16, E4M3 = (np.dtype(x) for x in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn))
DTYPES = (BFLOAT16, FLOAT16, E4M3)
_CREATE = "PagedKVCache.create"
_RANK = "[layers, pages, kv_heads, page_size, head_dim]"


@dataclasses.dataclass(frozen=True, eq=False)
class PagedKVCache:
    """Keys and values in pages of some tokens each, of one layer or of all.

    Which page belongs to which sequence is the caller's to know: `paged_append` is given slots, slot s being
    token s % page_size of page s // page_size, and `ragged_paged_attention` a table of pages for each
    sequence. Donate it to the function that appends, and it is updated in place.

    Args:
      k: [layers, pages, kv_heads, page_size, head_dim] bfloat16, float16 or float8_e4m3fn.
      v: [layers, pages, kv_heads, page_size, v_head_dim] of the same dtype.
      k_scale, v_scale: float32 [layers, kv_heads]; a key is its stored number times its head's scale. Ones,
        except of an FP8 cache.
      stacked: whether it has a dimension of layers, static; else that is 1, and no call names a layer.

    It is a pytree of four arrays. The tokens of a head in one page lie behind each other (HND).
    Raises nothing: functions that take it `check` it.

    >>> import jax.numpy as jnp
    >>> cache = PagedKVCache.create(pages=8, page_size=16, kv_heads=2, head_dim=64)
    >>> cache.k.shape, cache.pages, cache.page_size, cache.kv_heads, cache.layers
    ((1, 8, 2, 16, 64), 8, 16, 2, 1)
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array
    v_scale: jax.Array
    stacked: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def create(
        cls,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: DTypeLike = jnp.bfloat16,
        *,
        layers: int | None = None,
        v_head_dim: int | None = None,
        k_scale: ArrayLike | None = None,
        v_scale: ArrayLike | None = None,
        sharding: NamedSharding | None = None,
    ) -> PagedKVCache:
        """A cache of zeros.

        >>> import jax.numpy as jnp
        >>> fp8 = jnp.float8_e4m3fn
        >>> cache = PagedKVCache.create(4, 64, 8, 128, fp8, layers=32, k_scale=0.05, v_scale=0.1)
        >>> cache.k.shape, cache.k_scale.shape
        ((32, 4, 8, 64, 128), (32, 8))

        Args:
          pages: how many, for all sequences together.
          page_size: tokens of a page: 16, 32, 64, 128 or 256.
          kv_heads: heads of keys and values.
          head_dim: numbers of a key, a multiple of 16; kernels take up to 256.
          dtype: bfloat16, float16 or float8_e4m3fn.
          layers: of the model, where one cache is for all of them, and calls say `layer=`. None: it is one
            layer's.
          v_head_dim: numbers of a value; None: as of a key.
          k_scale, v_scale: of an FP8 cache, what stored numbers are multiplied by: a number, [kv_heads] or
            [layers, kv_heads], positive, calibrated so that keys / scale are within 448. None: 1.
          sharding: a NamedSharding of [layers, pages, kv_heads, page_size, head_dim]: heads cut over devices
            are `P(None, None, "x")`. Scales follow.

        Raises:
          TypeError, ValueError: sizes, types or scales outside of the above; the message says what to do.
        """
        sizes = {"pages": pages, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size}
        sizes |= {"v_head_dim": head_dim if v_head_dim is None else v_head_dim}
        sizes |= {"layers": 1 if layers is None else layers}
        sizes = {name: positive(_CREATE, name, size) for name, size in sizes.items()}
        kind = _dtype(_CREATE, dtype)
        shape = (sizes["layers"], pages, kv_heads, page_size)
        if kind != E4M3 and not (k_scale is None and v_scale is None):
            raise ValueError(
                f"{_CREATE}: dtype is {kind.name} and scales are given, which only float8_e4m3fn has. Leave "
                "them out."
            )
        whole, of_scales = None, None
        if sharding is not None:
            spec = entries(_spec(sharding), 5)
            whole = NamedSharding(sharding.mesh, as_spec(spec))
            of_scales = NamedSharding(sharding.mesh, as_spec([spec[0], spec[2]]))
        made = cls(
            jnp.zeros((*shape, sizes["head_dim"]), kind, device=whole),
            jnp.zeros((*shape, sizes["v_head_dim"]), kind, device=whole),
            _scale("k_scale", k_scale, (shape[0], shape[2]), of_scales),
            _scale("v_scale", v_scale, (shape[0], shape[2]), of_scales),
            layers is not None,
        )
        return made.check(_CREATE)

    @property
    def layers(self) -> int:
        """Layers that have pages; 1 of a cache without that dimension."""
        return self.k.shape[0]

    @property
    def pages(self) -> int:
        """Pages of a layer."""
        return self.k.shape[1]

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.k.shape[2]

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.k.shape[3]

    @property
    def head_dim(self) -> int:
        """Numbers of a key."""
        return self.k.shape[4]

    @property
    def v_head_dim(self) -> int:
        """Numbers of a value."""
        return self.v.shape[4]

    @property
    def dtype(self) -> np.dtype:
        """Of stored numbers."""
        return np.dtype(self.k.dtype)

    def check(self, where: str = "PagedKVCache") -> PagedKVCache:
        """Returns itself if types and shapes fit each other and the functions of this module.

        Args:
          where: the function to name in the message.

        Raises:
          TypeError, ValueError: what does not fit; the message says what to do.
        """
        for name in ("k", "v", "k_scale", "v_scale"):
            x, rank = getattr(self, name), 2 if name.endswith("scale") else 5
            if len(getattr(x, "shape", ())) != rank or not hasattr(x, "dtype"):
                need = "float32 [layers, kv_heads]" if rank == 2 else _RANK
                raise ValueError(
                    f"{where}: {name} of the cache is {describe(x)}, need {need}. Make it with "
                    "PagedKVCache.create."
                )
        _dtype(where, self.k.dtype)
        if self.v.dtype != self.k.dtype or self.v.shape[:4] != self.k.shape[:4]:
            raise ValueError(
                f"{where}: the cache has k {describe(self.k)} and v {describe(self.v)}, need one dtype and "
                "shapes that differ in the last dimension alone. Make it with PagedKVCache.create."
            )
        if self.kv_heads < 1 or (not self.stacked and self.layers != 1):
            raise ValueError(
                f"{where}: the cache has k {describe(self.k)} and stacked={self.stacked}, need {_RANK}, a "
                "head at least, and one layer unless stacked. Make it with PagedKVCache.create, and layers= "
                "for several."
            )
        if self.page_size not in PAGE_SIZES:
            sizes = ", ".join(map(str, PAGE_SIZES))
            raise ValueError(f"{where}: page_size is {self.page_size}, need one of {sizes}.")
        for name, size in (("head_dim", self.head_dim), ("v_head_dim", self.v_head_dim)):
            if size < 1 or size % STEP:
                raise ValueError(
                    f"{where}: {name} is {size}, need a multiple of {STEP}. Pad heads with zeros, "
                    f"{-size % STEP} here, and give scale= of the size without them."
                )
        for name in ("k_scale", "v_scale"):
            x = getattr(self, name)
            if x.shape != (self.layers, self.kv_heads) or x.dtype != np.float32:
                raise ValueError(
                    f"{where}: {name} is {describe(x)}, need float32 [{self.layers}, {self.kv_heads}]: one "
                    "of each head of each layer. `with_scales` makes it of a number or of one for each head."
                )
        return self

    def with_scales(self, k_scale: ArrayLike, v_scale: ArrayLike) -> PagedKVCache:
        """The same pages with other scales: what is stored already then means something else.

        Args:
          k_scale, v_scale: numbers, [kv_heads] or [layers, kv_heads], as in `create`.

        Raises:
          ValueError: scales of a cache that is not FP8, or of another shape.
        """
        if self.dtype != E4M3:
            raise ValueError(
                f"PagedKVCache.with_scales: the cache is {self.dtype.name}, and only float8_e4m3fn has "
                "scales. Create it with dtype=jnp.float8_e4m3fn."
            )
        shape = (self.layers, self.kv_heads)
        by_k, by_v = _scale("k_scale", k_scale, shape, None), _scale("v_scale", v_scale, shape, None)
        return PagedKVCache(self.k, self.v, by_k, by_v, self.stacked)


jax.tree_util.register_dataclass(
    PagedKVCache, data_fields=("k", "v", "k_scale", "v_scale"), meta_fields=("stacked",)
)


def _dtype(where: str, given: Any) -> np.dtype:
    try:
        kind = None if given is None else np.dtype(given)  # np.dtype(None) is float64
    except TypeError:
        kind = None
    if kind not in DTYPES:
        known = ", ".join(one.name for one in DTYPES)
        raise TypeError(f"{where}: dtype is {getattr(kind, 'name', given)}, need one of {known}.")
    return kind


def _spec(sharding: Any) -> PartitionSpec:
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"{_CREATE}: sharding is {sharding!r}, need a NamedSharding of {_RANK}: NamedSharding(mesh, "
            "P(None, None, 'x')) cuts heads."
        )
    return sharding.spec


def _scale(name: str, given: Any, shape: tuple[int, int], place: NamedSharding | None) -> jax.Array:
    """float32 [layers, kv_heads]. Numbers that are known while tracing are looked at."""
    x = 1.0 if given is None else given
    if np.shape(x) not in ((), shape[1:], shape):
        raise ValueError(
            f"{_CREATE}: {name} is {describe(x)}, need a number, {list(shape[1:])} (of each head) or "
            f"{list(shape)} (of each layer's heads)."
        )
    if isinstance(x, (int, float, np.ndarray, list, tuple)) and not np.all(np.asarray(x, np.float64) > 0):
        raise ValueError(f"{_CREATE}: {name} is {x!r}, need positive numbers: a key is stored * scale.")
    made = jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape)
    return made if place is None else jax.device_put(made, place)
