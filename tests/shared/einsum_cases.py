"""Einsums that are one product: strings, sizes, operands, and the oracle in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PRODUCTS = {
    "bhr,hdr->bhd": ("mhk,hnk->mhn", "nt"),
    "hdr,bhr->bhd": ("mhk,hnk->mhn", "nt"),
    "bhd,hdr->bhr": ("mhk,hkn->mhn", "nn"),
    "bhd,bhr->hdr": ("khm,khn->hmn", "tn"),
    "hdb,hrb->hdr": ("hmk,hnk->hmn", "nt"),
    "bmk,bnk->mn": ("rmk,rnk->mn", "nt"),
    "bmk,nbk->nm": ("mrk,rnk->mn", "nt"),
    "bkm,nkb->mn": ("krm,nrk->mn", "tt"),
    "abmk,abnk->mn": ("rmk,rnk->mn", "nt"),
    "mk,nk->mn": ("mk,nk->mn", "nt"),
    "abk,kn->abn": ("mk,kn->mn", "nn"),
    "abc,cd->dab": ("km,nk->mn", "tt"),
    "kbm,kbn->mn": ("km,kn->mn", "tn"),
    "mn,bnk->bmk": ("mk,hkn->hmn", "nn"),
    "mn,bmk->bnk": ("km,hkn->hmn", "tn"),
    "mk,vnk->vmn": ("mk,hnk->hmn", "nt"),
    "abk,nk->ban": ("hmk,nk->mhn", "nt"),
    "xhk,yhk->hxy": ("mhk,nhk->hmn", "nt"),
    "gabmk,gnk->gabmn": ("hmk,hnk->hmn", "nt"),
}
"""Each with the orders of its operands, of which the second has the result's columns, and the layout."""


def shapes(expr: str, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
    """Of both operands and the result."""
    terms = expr.replace("->", ",").split(",")
    return tuple(tuple(sizes[letter] for letter in term) for term in terms)


def draw(expr: str, sizes: Mapping[str, int], seed: int = 0) -> list[jax.Array]:
    """Both operands, and C, standard normal."""
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16) for shape in shapes(expr, sizes)
    ]


def exact(expr: str, a: Any, b: Any, c: Any = None) -> np.ndarray:
    """The result in float64."""
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    return np.einsum(expr, a, b) + (0 if c is None else np.asarray(c).astype(np.float64))


def error(got: Any, want: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(
        np.abs(np.asarray(got).astype(np.float64) - want).max(initial=0) / max(np.abs(want).max(), 1e-30)
    )
