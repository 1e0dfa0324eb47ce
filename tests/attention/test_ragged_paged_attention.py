"""ragged_paged_attention against float64, over drawn batches and every option; bad data; transformations."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.attention import ragged_paged_attention
from tests.shared import attention_oracle as oracle

LENS = {
    "decode": ([1] * 6, [1, 15, 16, 17, 40, 64]),
    "prompts": ([5, 17, 1, 33], [5, 17, 1, 33]),
    "parts of prompts": ([7, 20, 3], [30, 41, 48]),
    "mixed, and nothing": ([1, 0, 9, 2, 0, 1], [0, 12, 9, 33, 0, 50]),
}
HEADS = {"mha": (3, 3), "gqa4": (8, 2), "gqa7": (7, 1), "gqa8": (8, 1)}


def check(b: oracle.Batch, tolerance: float = 1e-2, **options: Any) -> None:
    want, want_lse = oracle.attention(b, **options)
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in options.items() if isinstance(x, np.ndarray)}
    run = functools.partial(ragged_paged_attention, return_lse=True, **{**options, **arrays})
    out, lse = jax.jit(run)(*b.call())
    assert out.dtype == b.q.dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(np.asarray(lse), want_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lens", LENS)
def test_against_float64(lens, heads):
    h, g = HEADS[heads]
    check(oracle.draw(0, *LENS[lens], heads=h, kv_heads=g))


SLOPES, SINKS = 2.0 ** -np.arange(1, 9), np.linspace(-1, 3, 8)
OPTIONS = {
    "window": {"window": 9},
    "window of one": {"window": 1},
    "softcap": {"softcap": 0.8},
    "alibi": {"alibi_slopes": SLOPES},
    "sinks": {"sinks": SINKS},
    "not causal": {"causal": False},
    "scale": {"scale": 0.7},
    "all": {"window": 20, "softcap": 2.0, "alibi_slopes": SLOPES, "sinks": SINKS, "scale": 0.3},
    "rows beyond": {"max_q_len": 4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    given = OPTIONS[name]
    for lens in ("parts of prompts", "mixed, and nothing"):
        check(oracle.draw(1, *LENS[lens], heads=8, window=given.get("window")), **given)


@pytest.mark.parametrize("page", [16, 32, 64, 128, 256])
def test_page_sizes_and_lengths_at_their_edges(page):
    lens = [0, 1, page - 1, page, page + 1]
    check(oracle.draw(2, [min(n, 2) for n in lens], lens, heads=2, kv_heads=1, page=page))


def test_other_types():
    lens = LENS["parts of prompts"]
    check(oracle.draw(3, *lens, dtype=jnp.float16), 2e-3)
    check(oracle.draw(4, *lens, dtype=jnp.float8_e4m3fn), 2e-2)
    check(oracle.draw(5, *lens, head_dim=192, v_head_dim=128))
