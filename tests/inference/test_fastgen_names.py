"""Every kernel of DeepSpeed's FastGen: the list is frozen, table and page follow it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_deepgemm.attention import PagedKVCache
from jax_deepgemm.inference import fastgen_names
from tests.shared import inference_oracle as oracle
from tests.shared.inference_oracle import close, drawn, visible, wide

NAMES = """
    bias_activation blas_4d_matmul blas_linear build_atoms cuda_wf6af16_linear flash_attn_by_atoms
    gated_activation gather_for_logits kv_rotary_embeddings kv_trained_rotary_embeddings layer_norm
    linear_kv_copy mixed_gemm mixed_moe_gemm moe_gather moe_gemm moe_scatter post_layer_norm pre_layer_norm
    preprocess_weight ragged_embed rms_norm rms_pre_norm top_k_gating
"""
PAGE = Path(__file__).parents[2] / "docs" / "from_deepspeed.md"
BEGIN, END = "<!-- begin fastgen names -->", "<!-- end fastgen names -->"
BF16 = ml_dtypes.bfloat16


@pytest.mark.any_version
def test_the_list_is_the_table_and_the_page() -> None:
    assert len(NAMES.split()) == 24
    assert sorted(fastgen_names) == NAMES.split()
    text = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    rows = re.findall(r"^\| (`[^|]*) \| [^|]+ \| [^|]* \|$", text, re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == NAMES.split()


Case = tuple[list[Any], Callable[..., Any], float]
T, K, N, E = 7, 16, 32, 3
FIVE, PADDED = np.array([5, 2], np.int32), T
"""Of 7 rows the last two are padding: 5 tokens of 2 sequences."""
SEQUENCES = np.array([[0, 2, 3, 0], [2, 3, 0, 0], [5, 9, 9, 0]], np.int32)
"""First row, rows, tokens before; the third is none."""
OWNERS = np.array([0, 0, 1, 1, 1, 0, 2], np.int32)
POSITIONS = [3, 4, 0, 1, 2]
TABLES = np.array([[5, 1], [2, -1], [7, 7]], np.int32)


def cases() -> dict[str, Case]:
    x, residual = drawn(0, T, K, dtype=BF16), drawn(1, T, K, dtype=BF16)
    gamma, beta, bias = (drawn(seed, K, dtype=BF16) for seed in (2, 3, 4))
    w, out_bias = (drawn(5, N, K) / 4).astype(BF16), drawn(6, N, dtype=BF16)
    experts, expert_bias = (drawn(7, E, K, N) / 4).astype(BF16), drawn(8, E, N, dtype=BF16)
    ends = np.array([2, 2, 6], np.int32)
    int8 = np.random.default_rng(9).integers(-128, 128, (K, N)).astype(np.int8)
    int4 = np.random.default_rng(10).integers(-8, 8, (E, K, N))
    packed = ((int4[..., ::2] & 15) | (int4[..., 1::2] & 15) << 4).astype(np.uint8)
    scales = np.abs(drawn(11, E, N)).astype(BF16) / BF16(64)
    fp6 = drawn(12, N, K).astype(ml_dtypes.float6_e3m2fn).astype(np.float32)
    four = drawn(13, 2, 3, K, dtype=BF16), drawn(14, 2, K, 5, dtype=BF16)

    def rounded(x: Any, r: Any) -> Any:
        return (x + r).astype(np.float32).astype(BF16).astype(np.float64)

    def gates(_: Any, x: Any, b: Any, __: Any) -> Any:
        z = x + b
        return oracle.silu(z[:, ::2]) * z[:, 1::2]

    def by_expert(x: Any, w: Any, b: Any, act: Callable[..., Any]) -> Any:
        out = np.zeros((T, N))
        for row in range(6):
            e = int(np.searchsorted(ends, row, side="right"))
            out[row] = act(x[row] @ w[e] + b[e])
        return out

    def pre(_: Any, __: Any, x: Any, r: Any, g: Any, b: Any, ___: Any) -> Any:
        return x + r, oracle.layer_norm(rounded(x, r), g, b, 1e-3)

    def rms_pre(_: Any, __: Any, x: Any, r: Any, g: Any, ___: Any) -> Any:
        return oracle.rms_norm(rounded(x, r), g, 1e-3), x + r

    def embedded(_: Any, ids: Any, table: Any, places: Any, *__: Any) -> Any:
        rows = np.array([*POSITIONS, 0, 0]) + 2
        found = table[ids.astype(int) % len(table)] + places[np.minimum(rows, len(places) - 1)]
        return np.where((np.arange(T) < 5)[:, None], found, 0)

    ids = np.array([1, 0, 3, 2, 2, 99, -5], np.int32)
    table, places = drawn(15, 4, K, dtype=BF16), drawn(16, 6, K, dtype=BF16)
    batch: list[Any] = [FIVE, SEQUENCES, OWNERS, TABLES]
    return {
        "bias_activation": ([x, bias, 2], lambda x, b, _: oracle.silu(x + b), 1),
        "gated_activation": ([None, x, bias, 5], gates, 2),
        "layer_norm": ([None, x, gamma, beta, 1e-3], lambda _, x, g, b, e: oracle.layer_norm(x, g, b, e), 1),
        "pre_layer_norm": ([None, None, x, residual, gamma, beta, 1e-3], pre, 1),
        "post_layer_norm": (
            [np.zeros((T, K), np.float32), x, residual, gamma, beta, 1e-3],
            lambda _, x, r, g, b, e: oracle.layer_norm(rounded(x, r), g, b, e),
            2**17,
        ),
        "rms_norm": ([None, x, gamma, 1e-3], lambda _, x, g, e: oracle.rms_norm(x, g, e), 1),
        "rms_pre_norm": ([None, None, x, residual, gamma, 1e-3], rms_pre, 1),
        "blas_linear": ([None, x, w], lambda _, x, w: x @ w.T, 2),
        "blas_4d_matmul": ([None, four[1], four[0]], lambda _, b, a: a @ b, 2),
        "mixed_gemm": (
            [None, x, int8, scales[0], out_bias, 8, 1],
            lambda _, x, w, s, b, *__: np.maximum(x @ (w * s) + b, 0),
            2,
        ),
        "moe_gemm": (
            [None, x, experts, expert_bias, ends, 0],
            lambda _, x, w, b, *__: by_expert(x, w, b, oracle.gelu_tanh),
            2,
        ),
        "mixed_moe_gemm": (
            [None, x, packed, scales, expert_bias, ends, 4, 6],
            lambda _, x, w, s, b, *__: by_expert(x, int4 * s[:, None], b, oracle.identity),
            4,
        ),
        "preprocess_weight cuda_wf6af16_linear": (
            [x, fp6, np.abs(drawn(17, N))],
            lambda x, w, s: x @ (w * s[:, None]).T,
            4,
        ),
        "ragged_embed": ([None, ids, table, places, 2, *batch], embedded, 1),
        "gather_for_logits": (
            [None, x, FIVE, SEQUENCES],
            lambda _, x, *__: np.stack([x[1], x[4], np.zeros(K)]),
            0,
        ),
    }


CASES = cases()


def _fp6(x: Any, w: Any, scale: Any) -> Any:
    high, low = fastgen_names["preprocess_weight"](w)
    assert (high.shape, low.shape) == ((N, K // 4), (N, K // 2))
    return fastgen_names["cuda_wf6af16_linear"](None, x, high, low, scale, None, N, T, K, 1)


def _experts(logits: Any, x: Any) -> Any:
    """The way of tokens through experts, and what is kept of it."""
    k = jax.ShapeDtypeStruct((T, 2), jnp.float32)
    gating = fastgen_names["top_k_gating"](None, k, None, None, logits, FIVE)
    counts, scores, ids, offsets = gating
    rows, ends, slots = fastgen_names["moe_scatter"](None, None, None, x, counts, ids, offsets)
    sums = [
        fastgen_names["moe_gather"](None, rows, scores, slots, counts, normalised)
        for normalised in (False, True)
    ]
    return *gating, rows, ends, slots, *sums


def _attention(cache: Any, q: Any, k: Any, v: Any, rates: Any) -> Any:
    batch = (FIVE, SEQUENCES, OWNERS, TABLES)
    rotary = fastgen_names["kv_rotary_embeddings"](cache, q, k, v, 8, 500.0, *batch)
    trained = fastgen_names["kv_trained_rotary_embeddings"](cache, q, k, v, rates, *batch)
    copied, same = fastgen_names["linear_kv_copy"](cache, q, k, v, *batch)
    atoms = fastgen_names["build_atoms"](None, FIVE, SEQUENCES, TABLES, 64, 16)
    out = fastgen_names["flash_attn_by_atoms"](None, same, copied, None, atoms, 0.25, True)
    return rotary, trained, copied, same, atoms, out


LOGITS = drawn(20, T, 5)
LOGITS[2, 1] = LOGITS[2, 3] = 9.0  # a tie
Q, K2, V = (drawn(seed, T, heads * 16, dtype=BF16) for seed, heads in ((21, 4), (22, 2), (23, 2)))
BEFORE = drawn(24, 2, 5, 2, 16, dtype=BF16)
"""Keys and values of the first 5 slots of page 5."""


def _cache() -> PagedKVCache:
    """NaN but where tokens are."""
    cache = PagedKVCache.create(pages=8, page_size=16, kv_heads=2, head_dim=16)
    k, v = (
        jnp.full_like(old, jnp.nan).at[0, 5, :, :5].set(new.swapaxes(0, 1))
        for old, new in zip((cache.k, cache.v), BEFORE, strict=True)
    )
    return PagedKVCache(k, v, cache.k_scale, cache.v_scale)


@functools.cache
def results() -> dict[str, Any]:
    """Of all calls, as one program."""
    arrays = {name: [a for a in case[0] if isinstance(a, np.ndarray)] for name, case in CASES.items()}

    def run(arrays: dict[str, list[Any]], experts: Any, attention: Any) -> dict[str, Any]:
        found = {"experts": _experts(*experts), "attention": _attention(*attention)}
        for name, (arguments, _, _) in CASES.items():
            traced = iter(arrays[name])
            filled = [next(traced) if isinstance(a, np.ndarray) else a for a in arguments]
            found[name] = _fp6(*filled) if " " in name else fastgen_names[name](*filled)
        return found

    rates = oracle.rates(4).astype(np.float32)
    return jax.jit(run)(arrays, (LOGITS, drawn(25, T, 4)), (_cache(), Q, K2, V, rates))


@pytest.mark.parametrize("name", CASES)
def test_values(name: str) -> None:
    arguments, want, units = CASES[name]
    expected = want(*(wide(a) if isinstance(a, np.ndarray) else a for a in arguments))
    both = (results()[name], expected) if isinstance(expected, tuple) else ((results()[name],), (expected,))
    for one, right in zip(*both, strict=True):
        close(one, right, units)


def test_a_result_has_the_type_of_the_array_that_is_not_written() -> None:
    assert results()["post_layer_norm"].dtype == jnp.float32
    assert results()["layer_norm"].dtype == jnp.bfloat16


def test_experts() -> None:
    """top_k_gating, moe_scatter, moe_gather: ties go to the lower expert, padding nowhere."""
    counts, scores, ids, offsets, rows, ends, slots, plain, normalised = results()["experts"]
    order = np.argsort(-LOGITS, axis=1, kind="stable")[:, :2]
    real = (np.arange(T) < 5)[:, None]
    np.testing.assert_array_equal(ids, np.where(real, order, -1))
    all_scores = oracle.softmax(wide(LOGITS), np.ones(LOGITS.shape, bool))
    chosen = np.where(real, np.take_along_axis(all_scores, order, 1), 0)
    close(scores, chosen)
    seen: dict[int, int] = {}
    for t, s in np.ndindex(5, 2):
        e = int(order[t, s])
        assert offsets[t, s] == seen.get(e, 0)
        seen[e] = seen.get(e, 0) + 1
    np.testing.assert_array_equal(counts, [seen.get(e, 0) for e in range(5)])
    np.testing.assert_array_equal(ends, np.cumsum(counts))
    x = wide(drawn(25, T, 4))
    for t, s in np.ndindex(5, 2):
        np.testing.assert_array_equal(wide(rows)[slots[t, s]], x[t])
    assert (np.asarray(slots)[5:] == -1).all()
    close(plain, x * chosen.sum(1, keepdims=True))
    close(normalised, x * real)


def test_pages_and_attention() -> None:
    """The three that write to pages, build_atoms, flash_attn_by_atoms."""
    rotary, trained, copied, same, atoms, out = results()["attention"]
    np.testing.assert_array_equal(wide(same), wide(Q))
    np.testing.assert_array_equal(atoms.cu_q_lens, [0, 2, 5, 5])
    np.testing.assert_array_equal(atoms.kv_lens, [5, 3, 0])
    pages = [5, 5, 2, 2, 2]
    for (cache, q), rates in ((rotary, oracle.rates(8, 500.0)), (trained, oracle.rates(4))):
        places = np.array(POSITIONS)
        close(q[:5], oracle.rotary(wide(Q).reshape(T, 4, 16)[:5], places, rates).reshape(5, 64), 1)
        keys = oracle.rotary(wide(K2).reshape(T, 2, 16)[:5], places, rates)
        close(cache.k[0, pages, :, POSITIONS], keys, 1)
    np.testing.assert_array_equal(wide(copied.v[0, pages, :, POSITIONS]), wide(V).reshape(T, 2, 16)[:5])
    written = np.isfinite(wide(copied.k)).all((0, 2, 4))
    assert written.sum() == 5 + 3  # positions 3 and 4 of the first sequence were there
    q, k, v = (wide(x).reshape(T, -1, 16) for x in (Q, K2, V))
    old_k, old_v = wide(BEFORE)
    first = np.concatenate([old_k[:3], k[:2]]), np.concatenate([old_v[:3], v[:2]])
    want = np.zeros((T, 4, 16))
    for rows, (keys, values), offset in ((slice(0, 2), first, 3), (slice(2, 5), (k[2:5], v[2:5]), 0)):
        seen = visible(rows.stop - rows.start, len(keys), causal=True, offset=offset)
        want[rows] = oracle.attention(q[None, rows], keys[None], values[None], seen, scale=0.25)[0]
    close(out, want.reshape(T, 64), 2)


X = np.ones((T, K), np.float32)
ROW = X[0]
S3 = jax.ShapeDtypeStruct((T, 2), np.float32)
BAD: dict[str, tuple[list[Any], str]] = {
    "bias_activation": ([X, None, 9], "activation_type is 9, need one of 0, 1, 2, 6"),
    "gated_activation": ([None, X, None, 0], "activation_type is 0, need one of 3, 4, 5"),
    "layer_norm": ([X[:1], X, ROW, ROW, 1e-5], r"output is float32 \[1, 16\], need None or \[7, 16\]"),
    "pre_layer_norm": ([None, None, X, X[:1], ROW, ROW, 1e-5], r"residual is \[1, 16\]"),
    "post_layer_norm": ([None, X, X[:1], ROW, ROW, 1e-5], r"residual is \[1, 16\]"),
    "rms_norm": ([None, X, ROW[:1], 1e-5], r"gamma is \[1\], need \[16\]"),
    "rms_pre_norm": ([None, None, X, X[:1], ROW, 1e-5], r"residual is \[1, 16\]"),
    "blas_linear": ([None, X, X.T], r"need x \[.., k\] and w \[n, k\]"),
    "blas_4d_matmul": ([None, X, X], r"need \[.., n, k\] and \[.., k, m\]"),
    "mixed_gemm": ([None, X, X.T, ROW[:7], None, 8, 6], "weight is float32.*need int8"),
    "moe_gemm": (
        [None, X, np.ones((2, K, 4), np.float32), None, np.ones(3, np.int32), 6],
        r"group_sizes is \[3\]",
    ),
    "mixed_moe_gemm": (
        [None, X, X, ROW, None, np.ones(3, np.int32), 2, 6],
        "num_bits is 2, need one of 4, 8",
    ),
    "preprocess_weight": ([X[:, :7]], "k a multiple of 4"),
    "cuda_wf6af16_linear": (
        [None, X, X, X, ROW, None, 4, T, K, 1],
        r"weights_2bit is \[7, 16\], need \[4, 4\]",
    ),
    "ragged_embed": (
        [None, np.arange(T), X, None, 0, FIVE[:1], SEQUENCES, OWNERS, TABLES],
        "need .2. .tokens, seq",
    ),
    "gather_for_logits": (
        [X[:1], X, FIVE, SEQUENCES],
        r"final_token_acts is float32 \[1, 16\], need None or \[3, 16\]",
    ),
    "top_k_gating": ([None, None, None, None, X, FIVE], "says how many experts a token goes to"),
    "moe_scatter": ([None, None, None, X, FIVE, FIVE, FIVE], r"need \[tokens, h\] and \[tokens, k\]"),
    "moe_gather": ([None, X, X, FIVE, FIVE, False], r"need \[rows, h\] and twice \[tokens, k\]"),
    "build_atoms": ([None, FIVE, SEQUENCES, FIVE, 64, 16], r"need the tables of pages"),
    "flash_attn_by_atoms": ([None, X, X, X, None, 1.0, True], "k is float32.*need a PagedKVCache"),
    "kv_rotary_embeddings": (
        [X, X, X, X, 8, 1e4, FIVE, SEQUENCES, OWNERS, TABLES],
        "kv_cache is .*need a PagedKVCache",
    ),
    "kv_trained_rotary_embeddings": (
        [X, X, X, X, ROW, FIVE, SEQUENCES, OWNERS, TABLES],
        "need a PagedKVCache",
    ),
    "linear_kv_copy": ([X, X, X, X, FIVE, SEQUENCES, OWNERS, TABLES], "need a PagedKVCache"),
}


@pytest.mark.any_version
@pytest.mark.parametrize("name", NAMES.split())
def test_errors_say_what_to_do(name: str) -> None:
    arguments, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=f": .*{message}"):
        fastgen_names[name](*arguments)
    with pytest.raises(TypeError, match=rf"^{name}: 30 positional arguments, need \d+ \("):
        fastgen_names[name](*range(30))
