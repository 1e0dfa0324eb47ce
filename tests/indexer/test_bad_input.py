"""What is wrong is an error with a way out while tracing, and defined at run time: it hurts nobody else."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm import quantize, topk
from jax_deepgemm.indexer import bf16_mqa_logits, mqa_logits, paged_mqa_logits
from jax_deepgemm.ops.indexer.paged_op import bytes_of
from tests.shared.arrays import normal

pytestmark = pytest.mark.any_version

S, N, H, D, PAGE, PAGES = 6, 32, 4, 32, 16, 5
E4M3, E5M2, F32, NAN = jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float32, jnp.nan
Q, KV, WEIGHTS = normal(0, S, H, D), normal(1, N, D), normal(2, S, H, dtype=F32)
QUERIES, KEYS = quantize(Q), quantize(KV)
START, END = jnp.full(S, 3), jnp.full(S, N - 4)
CACHE = normal(3, PAGES, PAGE, D).astype(E4M3), jnp.ones((PAGES, PAGE))
TABLES = jnp.arange(S)[:, None] % PAGES + jnp.zeros((1, 2), int)
LENS = jnp.full(S, PAGE + 5)


def dense(
    q: Any = QUERIES, kv: Any = KEYS, weights: Any = WEIGHTS, start: Any = START, end: Any = END
) -> Any:
    return mqa_logits(q, kv, weights, start, end)


def plain(q: Any = Q, kv: Any = KV, weights: Any = WEIGHTS, start: Any = START, end: Any = END) -> Any:
    return bf16_mqa_logits(q, kv, weights, start, end)


def paged(
    q: Any = QUERIES,
    cache: Any = CACHE,
    weights: Any = WEIGHTS,
    lens: Any = LENS,
    tables: Any = TABLES,
    **more: Any,
) -> Any:
    """One token of each request."""
    q = tuple(x[:, None] for x in (q.values, q.scales)) if hasattr(q, "scales") else q
    return paged_mqa_logits(q, cache, weights[:, None], lens, tables, **more)[:, 0]


# While tracing ---------------------------------------------------------------------------------------------

HALF = functools.partial(jnp.asarray, dtype=jnp.float16)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        # dtypes
        (TypeError, "q is int8 .*need float8", lambda: dense(q=Q.astype(jnp.int8))),
        (TypeError, "values of kv is float8_e5m2", lambda: dense(kv=(KV.astype(E5M2), KEYS.scales))),
        (TypeError, "kv is float16.*astype.jnp.bfloat16", lambda: plain(kv=HALF(KV))),
        (TypeError, "weights is float16.*astype.jnp.float32", lambda: dense(weights=HALF(WEIGHTS))),
        (TypeError, "k_end is float32.*need integers", lambda: dense(end=END.astype(F32))),
        (TypeError, "kv_cache is int8.*uint8", lambda: paged(cache=jnp.zeros((5, 16, 36), jnp.int8))),
        (TypeError, "scales of kv_cache is float16", lambda: paged(cache=(CACHE[0], HALF(CACHE[1])))),
        (TypeError, "block_tables is float32", lambda: paged(tables=TABLES.astype(F32))),
        (TypeError, "weights is float16", lambda: paged(weights=HALF(WEIGHTS))),
        # scales of another shape, or type
        (ValueError, r"scales of q are \[5, 4\], need \[6, 4\] or \[6, 4, 1\]",
         lambda: dense(q=(QUERIES.values, QUERIES.scales[:5, :, 0]))),
        (ValueError, r"scales of kv are \[32, 2\], need \[32\]",
         lambda: dense(kv=(KEYS.values, jnp.ones((N, 2))))),
        (ValueError, r"scales of kv are \[1\]", lambda: dense(kv=(KEYS.values, jnp.ones(1)))),
        (TypeError, "scales of kv is float16.*quantize", lambda: dense(kv=(KEYS.values, HALF(KEYS.scales)))),
        (ValueError, r"scales of q are \[6, 4\].*need \[6, 1, 4\]",
         lambda: paged_mqa_logits((QUERIES.values[:, None], QUERIES.scales[..., 0]), CACHE, WEIGHTS[:, None],
                                  LENS, TABLES)),
        (ValueError, r"scales \[5, 8\].*one scale for each",
         lambda: paged(cache=(CACHE[0], CACHE[1][:, :8]))),
        # windows, contexts and pages that are known
        (ValueError, r"window of token 2 is \[-1, 9\)", lambda: dense(start=np.array([0, 0, -1, 0, 0, 0]),
                                                                  end=np.full(S, 9))),
        (ValueError, r"window of token 5 is \[0, 33\).*n = 32", lambda: dense(start=np.zeros(S, int),
                                                                          end=np.arange(28, 34))),
        (ValueError, r"window of token 0 is \[5, 4\).*np.clip", lambda: dense(start=np.full(S, 5),
                                                                          end=np.full(S, 4))),
        (ValueError, r"context_lens\[0\] is 33.*need 0 to 32. Give it more pages",
         lambda: paged(lens=np.full(S, 33))),
        (ValueError, r"block_tables\[4, 1\] is 5.*cache has 5 pages",
         lambda: paged(lens=np.full(S, 17), tables=np.array([[0, 1]] * 4 + [[0, 5]] * 2))),
        # k
        (ValueError, "k is -1, need a whole number", lambda: topk(jnp.zeros((2, 9)), -1)),
        (ValueError, "k is True", lambda: topk(jnp.zeros((2, 9)), True)),
    ],
)  # fmt: skip
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_ways_out_of_these_errors():
    start, end = np.full(S, 5), np.arange(28, 34) - 25
    end = np.clip(end, 0, N)
    assert dense(start=np.clip(start, 0, end), end=end).shape == (S, N)
    assert dense(weights=HALF(WEIGHTS).astype(F32)).shape == (S, N)
    assert paged(lens=np.full(S, 33), tables=np.zeros((S, 3), int)).shape == (S, 48)


# At run time -----------------------------------------------------------------------------------------------


def rest_is(got: Any, clean: Any, row: int) -> None:
    np.testing.assert_array_equal(np.delete(got, row, 0), np.delete(clean, row, 0))


@pytest.mark.parametrize("form", ["fp8", "bf16", "pages"])
@pytest.mark.parametrize("what", ["q", "weights"])
def test_nan_of_a_token_is_its_row_s_alone(form, what):
    call = {"fp8": dense, "bf16": plain, "pages": paged}[form]
    clean = np.asarray(call())
    if what == "weights":
        got = call(weights=WEIGHTS.at[2, 1].set(NAN))
    elif form == "bf16":
        got = call(q=Q.at[2, 1, 5].set(NAN))
    else:
        got = call(q=QUERIES.with_values(QUERIES.values.at[2, 1, 5].set(NAN)))
    np.testing.assert_array_equal(np.isnan(got)[2], np.isfinite(clean)[2])
    rest_is(got, clean, 2)
    assert np.all(np.asarray(topk(got, 4))[2] == -1)
    rest_is(topk(got, 4), topk(clean, 4), 2)


def test_nan_of_a_key_is_its_column_s_alone():
    """And is chosen by nobody."""
    clean = np.asarray(dense())
    bad = KEYS.with_values(KEYS.values.at[9, 3].set(NAN))
    got = np.asarray(dense(kv=bad))
    assert np.isnan(got[:, 9]).all()
    np.testing.assert_array_equal(np.delete(got, 9, 1), np.delete(clean, 9, 1))
    assert not np.any(np.asarray(topk(got, N)) == 9)
    values = CACHE[0].at[2, 3, 1].set(NAN)
    got, clean = np.asarray(paged(cache=(values, CACHE[1]))), np.asarray(paged())
    theirs = np.asarray(TABLES)[:, :1] == 2
    np.testing.assert_array_equal(
        np.isnan(got), (np.arange(2 * PAGE) % PAGE == 3) & theirs & np.isfinite(clean)
    )


@pytest.mark.parametrize("joined", [False, True])
def test_no_other_request_s_pages_are_read(joined):
    """Whatever tables and contexts hold: only pages that a request's table names reach its row."""
    others = jnp.arange(PAGES) != TABLES[1, 0]
    values = jnp.where(others[:, None, None], jnp.asarray(NAN, E4M3), CACHE[0])
    cache = values, jnp.where(others[:, None], NAN, CACHE[1])
    given = bytes_of(*cache).reshape(PAGES, PAGE, D + 4) if joined else cache
    for wrong in (-1, -(2**31), PAGES, PAGES + 1, 2**31 - 1):
        for lens in (2 * PAGE, 2**31 - 1):
            got = paged(cache=given, lens=jnp.full(S, lens), tables=TABLES.at[1, 1].set(wrong))
            assert np.isfinite(got[1, :PAGE]).all()
            assert not np.any(got[1, PAGE:])
    for lens in (0, -1, -(2**31)):
        assert np.isneginf(paged(cache=given, lens=jnp.full(S, lens))).all()


def test_more_than_the_kernel_chooses():
    """A k of more than 2048, or than there are columns: XLA sorts, with the same result."""
    x = jax.random.normal(jax.random.key(0), (2, 2500))
    got = np.asarray(topk(x, 2400))
    np.testing.assert_array_equal(got, jax.lax.top_k(x, 2400)[1])
    np.testing.assert_array_equal(topk(x, 3000)[:, :2400], got)
    assert np.all(np.asarray(topk(x, 3000))[:, 2500:] == -1)
