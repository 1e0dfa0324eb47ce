"""Attention to keys and values in a cache of pages: the cache, writing to it, and reading from it; and latent
attention, whose heads share one key."""

from jax_deepgemm.ops import attention as _attention
from jax_deepgemm.ops import mla as _mla
from jax_deepgemm.ops import paged_append as _append
from jax_deepgemm.ops.attention import *  # noqa: F403
from jax_deepgemm.ops.mla import *  # noqa: F403
from jax_deepgemm.ops.paged_append import *  # noqa: F403

__all__ = [*_attention.__all__, *_mla.__all__, *_append.__all__]
