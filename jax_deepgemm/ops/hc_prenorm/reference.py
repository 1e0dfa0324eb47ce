"""Projections of wide rows and the sums of their squares in jax.numpy."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from jax_deepgemm.core.products import dot_general
from jax_deepgemm.ops.hc_prenorm.family import BLOCK


def hc_prenorm(a: jax.Array, b: jax.Array, *, num_splits: int = 0, **_: object) -> list[jax.Array]:
    """a [m, k], b [n, k] -> a b^T [m, n], sums of squares [m], in float32; with splits, one more dimension
    in front, of parts of k."""
    wide, columns = a.astype(jnp.float32), b.astype(jnp.float32)
    if not num_splits:
        return [dot_general(wide, columns, ((1,), (1,))), jnp.sum(wide * wide, axis=-1)]
    wide, columns = pieces(wide, num_splits), pieces(columns, num_splits)
    return [dot_general(wide, columns, ((2,), (2,)), ((0,), (0,))), jnp.sum(wide * wide, axis=-1)]


def pieces(x: jax.Array, num_splits: int) -> jax.Array:
    """[rows, k] -> [splits, rows, width]: the parts of k, with zeros behind shorter ones.

    >>> pieces(jnp.ones((1, 150)), 2).sum(axis=-1).tolist()
    [[128.0], [22.0]]
    """
    bounds = split_bounds(x.shape[1], num_splits)
    width = max((end - start for start, end in bounds), default=0)
    each = [jnp.pad(x[:, start:end], ((0, 0), (0, width - end + start))) for start, end in bounds]
    return jnp.stack(each)


def split_bounds(k: int, num_splits: int) -> list[tuple[int, int]]:
    """Where each part of k begins and ends: whole blocks of 64; the first parts have one more each, where
    they cannot all have as many.

    >>> split_bounds(200, 3), split_bounds(64, 2)
    ([(0, 128), (128, 192), (192, 200)], [(0, 64), (64, 64)])
    """
    blocks = -(-k // BLOCK)
    each, more = divmod(blocks, num_splits)
    edges = [BLOCK * (split * each + min(split, more)) for split in range(num_splits + 1)]
    return [(min(start, k), min(end, k)) for start, end in itertools.pairwise(edges)]
