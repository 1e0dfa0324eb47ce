"""The bound by which scores are filtered as they are made: plain arithmetic, and the sample it is from."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepgemm.ops.indexer.reference import windows

STRIDE = 16
"""One of so many keys is in the sample."""
SEGMENTS = 8
"""Of a token's candidates, one for each warp that scores."""


class Filter(NamedTuple):
    """What a token's candidates are.

    Attributes:
      rank: the bound is the sample's rank-th score.
      places: of a segment.
    """

    rank: int
    places: int

    @property
    def most(self) -> int:
        """Candidates of a token that there is a place for."""
        return SEGMENTS * self.places


def filter_of(k: int) -> Filter:
    """A bound that is above the k-th score once in 10^5 times, and places for what is not below it.

    >>> filter_of(2048), filter_of(512), filter_of(1)
    (Filter(rank=178, places=512), Filter(rank=59, places=256), Filter(rank=6, places=64))
    """
    hits = k / STRIDE
    rank = math.ceil(hits + 4 * math.sqrt(hits) + 4)
    mean = rank * STRIDE / SEGMENTS
    most = mean * (1 + 4.5 * math.sqrt(1 / mean + 1 / rank))
    return Filter(rank, max(1 << (math.ceil(most) - 1).bit_length(), 64))


def sample_of(
    k: jax.Array, scales: jax.Array, start: jax.Array, end: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One of every STRIDE keys, anywhere among them, so that nothing that repeats decides; its scales; and
    the windows of tokens among those, without the edges."""
    count = k.shape[0] // STRIDE
    i = lax.iota(jnp.uint32, count)
    at = STRIDE * i + (i * np.uint32(0x9E3779B1) >> 28)
    first, last = windows(start, end, k.shape[0])
    first, last = -(-first // STRIDE), last // STRIDE
    keys, own = (x.at[at].get(mode="promise_in_bounds") for x in (k, scales))
    return keys, own, first, jnp.maximum(first, last)
