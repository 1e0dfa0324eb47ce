"""Attention to keys in pages on a GPU, against float64: batches that mix decoding, a few new tokens and
prompts, with NaN in all that must not be read; and bits that must not depend on other things.

Run: pytest -m gpu tests/gpu/test_attention_gpu.py        (about a minute)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.attention import PagedKVCache, ragged_paged_attention
from jax_deepgemm.ops.attention.problem import AttentionProblem
from tests.shared import attention_oracle as oracle

MIXED = [1, 3, 70, 8, 1, 130, 0, 40, 2], [900, 515, 70, 64, 17, 700, 30, 333, 0]
DECODE = [1] * 9, [1, 15, 16, 17, 300, 1025, 0, 2048, 64]
PROMPTS = [200, 33, 129], [200, 700, 129]
KINDS = {"bf16": jnp.bfloat16, "f16": jnp.float16, "e4m3": jnp.float8_e4m3fn}
SLOPES, SINKS = 2.0 ** -np.arange(1, 9), np.linspace(-2, 6, 8)


@dataclasses.dataclass(frozen=True)
class Case:
    """A drawn batch; `options` of the call."""

    lens: tuple[list[int], list[int]] = MIXED
    heads: tuple[int, int] = (8, 2)
    depths: tuple[int, int] = (128, 128)
    page: int = 16
    kind: str = "bf16"
    q_kind: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def batch(self, seed: int = 0, **changes: Any) -> oracle.Batch:
        heads, kv_heads = self.heads
        sizes = {"heads": heads, "kv_heads": kv_heads, "page": self.page}
        depths = {"head_dim": self.depths[0], "v_head_dim": self.depths[1]}
        drawn = oracle.draw(seed, *self.lens, **sizes, **depths, dtype=KINDS[self.kind], **changes)
        return dataclasses.replace(drawn, q=drawn.q.astype(KINDS[self.q_kind])) if self.q_kind else drawn

    def problem(self) -> AttentionProblem:
        needed = [-(-length // self.page) for length in self.lens[1]]
        o, kind = self.options, self.kind
        return AttentionProblem(
            tokens=sum(self.lens[0]) + 2,
            seqs=len(needed),
            table_pages=max(needed),
            pages=sum(needed) + 3,
            page=self.page,
            layers=1,
            heads=self.heads[0],
            kv_heads=self.heads[1],
            depth=self.depths[0],
            v_depth=self.depths[1],
            q_dtype=self.q_kind or ("bf16" if kind == "e4m3" else kind),
            kv_dtype=kind,
            window=o.get("window", 0),
            softcap=o.get("softcap", 0.0),
            causal=o.get("causal", True),
            with_sinks="sinks" in o,
            with_slopes="alibi_slopes" in o,
            max_q_len=o.get("max_q_len", 0),
            split=o.get("split", 0),
            scale=o.get("scale", self.depths[0] ** -0.5),
        )


HEADS = [
    Case(heads=(4, 4), depths=(16, 16)),
    Case(heads=(10, 2), depths=(32, 32), page=32),
    Case(heads=(8, 1), depths=(64, 64), page=128),
    Case(heads=(14, 2), depths=(80, 80), page=64, kind="f16"),
    Case(heads=(6, 2), depths=(96, 96)),
    Case(heads=(8, 8), depths=(112, 112), page=256),
    Case(heads=(16, 1), depths=(128, 128)),
    Case(heads=(4, 4), depths=(192, 128), page=32),
    Case(heads=(8, 2), depths=(256, 256), page=64),
    Case(heads=(12, 4), depths=(64, 64), page=32, kind="f16"),
    Case(heads=(71, 1), depths=(64, 64)),
    Case(DECODE, heads=(40, 8), page=64),
    Case(PROMPTS, heads=(8, 2), page=256),
]
FP8 = [
    Case(kind="e4m3"),
    Case(kind="e4m3", depths=(64, 64), page=128, heads=(8, 1)),
    Case(kind="e4m3", q_kind="f16", depths=(192, 128), page=32),
    Case(kind="e4m3", depths=(256, 256), page=64),
    Case(kind="e4m3", q_kind="f16", depths=(96, 96), options={"window": 50, "sinks": SINKS}),
]
OPTIONS = [
    {"window": 40},
    {"window": 1},
    {"window": 300, "sinks": SINKS},
    {"sinks": SINKS},
    {"softcap": 1.5},
    {"alibi_slopes": SLOPES},
    {"causal": False},
    {"scale": 0.3},
    {"window": 200, "softcap": 2.0, "alibi_slopes": SLOPES, "sinks": SINKS},
    {"max_q_len": 35},
    {"split": 256},
]
OPTIONAL = [
    Case(options=options, depths=depths, kind=kind, page=page)
    for options, depths, kind, page in zip(
        OPTIONS,
        [(64, 64), (128, 128), (64, 64), (128, 128), (80, 80)] * 3,
        ["f16", "bf16"] * 6,
        [32, 16, 128, 64] * 3,
        strict=False,
    )
]
PROMISE = Case(DECODE, options={"max_q_len": 1})
REPAGED = [Case(PROMPTS, page=page) for page in (16, 256)]
SPLIT = Case(([1] * 6, [500, 40, 1300, 64, 0, 999]), options={"split": 256, "max_q_len": 1})
LEFT = [Case(MIXED, options={"window": 40}), Case(DECODE, kind="e4m3", options={"window": 40})]
DESCENDING = Case(([20, *[0] * 5], [300, *[0] * 5]), options={"split": 256})


def kernels() -> Iterator[Any]:
    for case in (*HEADS, *FP8, *OPTIONAL, PROMISE, *REPAGED, SPLIT, *LEFT, DESCENDING, Case()):
        yield case.problem()


def name(case: Case) -> str:
    words = [case.kind, case.q_kind, f"d{case.depths[0]}", f"h{case.heads[0]}x{case.heads[1]}"]
    words += [f"page{case.page}", *case.options]
    return "-".join(word for word in words if word)


def program(**options: Any) -> Any:
    arrays = {key: jnp.asarray(x, jnp.float32) for key, x in options.items() if isinstance(x, np.ndarray)}
    return jax.jit(functools.partial(ragged_paged_attention, return_lse=True, **{**options, **arrays}))


def check(got: Any, batch: oracle.Batch, tolerance: float = 2e-2, **options: Any) -> None:
    options.pop("split", None)
    want, logs = oracle.attention(batch, **options)
    assert got[0].dtype == batch.q.dtype
    np.testing.assert_allclose(np.asarray(got[0], np.float64), want, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(np.asarray(got[1]), logs, atol=1e-3, rtol=1e-4)


def same(some: Any, others: Any) -> None:
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.smoke
@pytest.mark.parametrize("case", [*HEADS, *FP8], ids=name)
def test_against_float64(case: Case) -> None:
    batch = case.batch()
    check(program(**case.options)(*batch.call()), batch, 3e-2, **case.options)


@pytest.mark.parametrize("case", OPTIONAL, ids=name)
def test_options(case: Case) -> None:
    batch = case.batch(1)
    check(program(**case.options)(*batch.call()), batch, **case.options)


@pytest.mark.smoke
def test_the_promise_of_one_token() -> None:
    batch = PROMISE.batch()
    check(program(max_q_len=1)(*batch.call()), batch)


def test_pages_that_are_missing() -> None:
    """In the midst of sequences, of all kinds of numbers that name no page."""
    batch = Case().batch(2)
    tables = batch.tables.copy()
    tables[0, 3], tables[2, 0], tables[5, 40], tables[5, 7], tables[7, 20] = -1, 2**31 - 1, -(2**31), 4000, -7
    batch = dataclasses.replace(batch, tables=tables)
    check(program()(*batch.call()), batch)


@pytest.mark.parametrize("case", LEFT, ids=name)
def test_pages_that_a_window_has_left_may_hold_nan(case: Case) -> None:
    """Those that tables still name, and those that were given away."""
    window = case.options["window"]
    given_away, named = case.batch(8, window=window), case.batch(8, share=False)
    batch = dataclasses.replace(given_away, tables=named.tables)
    first = program(**case.options)(*batch.call())
    check(first, named, 3e-2, **case.options)
    same(program(**case.options)(*given_away.call()), first)


def test_starts_that_descend_lead_to_no_row_that_is_wrong() -> None:
    """Sequences that share rows have more parts than there is room for: rows are right, or zeros."""
    batch = DESCENDING.batch(9)
    want, _ = oracle.attention(batch)
    starts, lens, tables = batch.starts.copy(), batch.lens.copy(), batch.tables.copy()
    starts[::2], starts[1::2], lens[::2], lens[1::2] = 0, 20, 300, 0
    tables[:] = tables[0]
    given = dataclasses.replace(batch, starts=starts, lens=lens, tables=tables)
    found = np.asarray(program(**DESCENDING.options)(*given.call())[0], np.float64)
    assert np.minimum(np.abs(found - want), np.abs(found)).max() < 0.01 * np.abs(want).max()


def test_equal_bits_and_other_sequences() -> None:
    """Again and again, and with fewer sequences than there are rows of tables."""
    batch = Case().batch(3)
    run = program()
    first = run(*batch.call())
    for _ in range(20):
        same(run(*batch.call()), first)
    for count in (4, jnp.int32(6)):
        end = int(batch.starts[int(count)])
        fewer = jax.tree.map(np.asarray, program(num_seqs=count)(*batch.call()))
        same([x[:end] for x in fewer], [np.asarray(x)[:end] for x in first])
        assert not fewer[0][end:].astype(float).any()
        assert np.isneginf(fewer[1][end:]).all()


def test_layers() -> None:
    """The one that is asked for, known only when the program runs; of one that is not there, nothing."""
    batches = [Case().batch(seed) for seed in (4, 5)]
    stacked = [np.stack([getattr(b, part) for b in batches]) for part in ("k", "v", "k_scale", "v_scale")]
    cache = PagedKVCache(*map(jnp.asarray, stacked), stacked=True)
    run = jax.jit(lambda q, *rest, layer: ragged_paged_attention(q, *rest, layer=layer, return_lse=True))
    for layer, batch in enumerate(batches):
        q, _, *rest = batch.call()
        alone = program()(*batch.call())
        same(run(q, cache, *rest, layer=jnp.int32(layer)), alone)
    out, lse = run(q, cache, *rest, layer=jnp.int32(2))
    assert not np.asarray(out, float).any()
    assert np.isneginf(np.asarray(lse)).all()


def test_prompts_have_equal_bits_whatever_the_page() -> None:
    small, large = REPAGED
    batch, times = large.batch(6), large.page // small.page
    at = np.arange(times)
    inside = (batch.tables >= 0) & (batch.tables < len(batch.k))
    tables = np.where(inside[..., None], np.where(inside, batch.tables, 0)[..., None] * times + at, -1)

    def cut(x: np.ndarray) -> np.ndarray:
        pages, heads, _, depth = x.shape
        pieces = x.reshape(pages, heads, times, small.page, depth)
        return pieces.swapaxes(1, 2).reshape(pages * times, heads, small.page, depth)

    tables = tables.reshape(len(tables), -1).astype(np.int32)
    other = dataclasses.replace(batch, k=cut(batch.k), v=cut(batch.v), tables=tables)
    same(program()(*other.call()), program()(*batch.call()))


def test_parts_of_fixed_size_make_a_sequence_independent_of_others() -> None:
    batch = SPLIT.batch(7)
    run = program(**SPLIT.options)
    first = run(*batch.call())
    check(first, batch, **SPLIT.options)
    q, lens, kept = batch.q.copy(), batch.lens.copy(), [1, 3, 5]
    q[::2], lens[::2] = 1, [3, 700, 0]
    again = run(*dataclasses.replace(batch, q=q, lens=lens).call())
    same([np.asarray(x)[kept] for x in again], [np.asarray(x)[kept] for x in first])


def test_the_cache_is_not_copied() -> None:
    cache = PagedKVCache.create(pages=4096, page_size=16, kv_heads=8, head_dim=128, layers=4)
    q = jnp.ones((64, 32, 128), jnp.bfloat16)
    tables, starts = jnp.zeros((4, 8), jnp.int32), jnp.array([0, 1, 2, 3, 64])
    lens = jnp.array([100, 128, 1, 61])
    call = jax.jit(lambda *given: ragged_paged_attention(*given, layer=jnp.int32(3)))
    memory = call.lower(q, cache, tables, starts, lens).compile().memory_analysis()
    assert memory.temp_size_in_bytes < cache.k.nbytes // 8
