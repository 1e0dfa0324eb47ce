"""The kernels of logits, without a GPU: their source runs on the CPU, a thread for each of a block's, where
products are made when they are waited for, so that a slot that is given away too early is seen."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.core.chip import H200
from jax_deepgemm.jit import compile_kernel
from jax_deepgemm.ops.indexer import fp4, sm90
from jax_deepgemm.ops.indexer.family import FAMILY, IndexerConfig, LogitsProblem
from jax_deepgemm.ops.indexer.paged_op import bytes_of
from jax_deepgemm.ops.indexer.prepare import prepare, prepare_packed, prepare_paged, prepare_tokens
from tests.shared import native_logits
from tests.shared.arrays import normal
from tests.shared.device_code import fields_of_concept, fields_of_struct
from tests.shared.fp4_numbers import meant, random, words
from tests.shared.logits_oracle import calc_diff, exact, windows

pytestmark = pytest.mark.any_version

E4M3 = jnp.float8_e4m3fn


def operands(p: LogitsProblem, batch: int = 0, shift: int = 0) -> list[jax.Array]:
    """q, k, scales of FP8, weights, and windows, some of them beyond the keys."""
    lead = (batch,) if batch else ()
    tokens, keys = p.tokens // p.batches, p.keys // p.batches
    dtype = E4M3 if p.is_fp8 else jnp.bfloat16
    q = normal(0, *lead, tokens, p.heads, p.depth).astype(dtype)
    k = normal(1, *lead, keys, p.depth).astype(dtype)
    scales = [jnp.abs(normal(2, *lead, keys, dtype=jnp.float32))] * p.is_fp8
    drawn = [windows(seed, tokens, keys) for seed in range(max(batch, 1))]
    start, end = (jnp.asarray(np.stack(x)) for x in zip(*drawn, strict=True))
    bounds = [start - shift, end + shift] if batch else [start[0] - shift, end[0] + shift]
    return [q, k, *scales, normal(3, *lead, tokens, p.heads, dtype=jnp.float32), *bounds]


CASES = [
    (LogitsProblem(7, 261, 261, 24, 32), IndexerConfig(5, 3, warpgroups=2), 4),
    (LogitsProblem(9, 300, 100, 64, 128, "bf16", "bfloat16", compressed=True), IndexerConfig(2, 2), 3),
    (LogitsProblem(9, 300, 300, 30, 64), IndexerConfig(3, 3, tensor_sums=True), 3),
    (LogitsProblem(2 * 5, 2 * 140, 140, 3, 64, out="bfloat16", batches=2), IndexerConfig(3, 2), 2),
    (LogitsProblem(9, 300, 300, 30, 64), IndexerConfig(3, 3, linear=True), 3),
    (LogitsProblem(7, 700, 90, 64, 128, compressed=True), IndexerConfig(2, 2, linear=True, banks=1), 3),
    (LogitsProblem(3, 300, 300, 16, 128, "bf16"), IndexerConfig(2, 2, warpgroups=2, banks=1), 2),
]


@pytest.mark.parametrize(("p", "config", "grid"), CASES, ids=str)
def test_on_a_cpu(tmp_path: Path, p: LogitsProblem, config: IndexerConfig, grid: int) -> None:
    batch = p.batches if p.batches > 1 else 0
    given = operands(p, batch, shift=0 if p.compressed else 9)
    dtype = np.float32 if p.out == "float32" else jnp.bfloat16
    prepared = [np.asarray(x) for x in prepare(p.is_fp8, *given)]
    got = native_logits.run(tmp_path, p, config, prepared, np.full((p.tokens, p.columns), 7, dtype), grid)
    want = np.concatenate([_exact(p, *(x[i] if batch else x for x in given)) for i in range(p.batches)])
    np.testing.assert_array_equal(np.isneginf(got.astype(np.float32)), np.isneginf(want))
    rounded = config.tensor_sums or p.out != "float32"
    assert calc_diff(got, want) < (5e-6 if rounded else 1e-10)


PAGED = [
    (
        LogitsProblem(4 * 3, 3 * 64, 150, 24, 64, compressed=True, batches=4, page=64, pages=7),
        IndexerConfig(2, 2),
        2,
    ),
    (
        LogitsProblem(5, 9 * 16, 144, 64, 128, compressed=True, batches=5, page=16, pages=50, joined=True),
        IndexerConfig(1, 3, tensor_sums=True),
        3,
    ),
    (
        LogitsProblem(5, 20 * 16, 320, 64, 128, compressed=True, batches=5, page=16, pages=90, joined=True),
        IndexerConfig(1, 2, linear=True, banks=1),
        3,
    ),
]


@pytest.mark.parametrize(("p", "config", "grid"), PAGED, ids=str)
def test_pages_on_a_cpu(tmp_path: Path, p: LogitsProblem, config: IndexerConfig, grid: int) -> None:
    """Contexts of nothing, of one key, and of all; pages that no context reaches are NaN, or do not exist."""
    rng = np.random.default_rng(0)
    requests, width = p.batches, p.keys // p.page
    tokens = p.tokens // requests
    lens = np.sort(rng.integers(0, p.keys + 1, (requests, tokens)), axis=1).astype(np.int32)
    lens[0], lens[1], lens[2, :] = 0, p.keys, 1
    tables = np.stack([rng.permutation(p.pages)[:width] for _ in range(requests)]).astype(np.int32)
    reached = np.arange(width)[None] < -(-lens.max(1) // p.page)[:, None]
    used = np.unique(tables[reached])
    tables = np.where(reached, tables, 2**31 - 1)
    q = normal(0, requests, tokens, p.heads, p.depth).astype(E4M3)
    values = np.array(normal(1, p.pages, p.page, p.depth).astype(E4M3))
    scales = rng.uniform(0.5, 2, (p.pages, p.page)).astype(np.float32)
    unused = np.setdiff1d(np.arange(p.pages), used)
    values[unused], scales[unused] = np.nan, np.nan
    weights = normal(2, requests, tokens, p.heads, dtype=jnp.float32)
    cache = [bytes_of(jnp.asarray(values), jnp.asarray(scales))] if p.joined else [values, scales]
    prepared = [np.asarray(x) for x in prepare_paged(q, *cache, weights, 0 * lens, lens, tables)]
    got = native_logits.run(
        tmp_path, p, config, prepared, np.full((p.tokens, p.columns), 7, np.float32), grid
    )
    keys = values.astype(np.float64) * scales[..., None]
    keys = np.concatenate([keys, np.zeros_like(keys[:1])])
    want = np.concatenate(
        [
            exact(
                q[b],
                keys[np.minimum(tables[b], p.pages)].reshape(-1, p.depth),
                weights[b],
                0 * lens[b],
                lens[b],
                p.columns,
            )
            for b in range(requests)
        ]
    )
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    assert calc_diff(got, want) < (5e-6 if config.tensor_sums else 1e-10)


PACKED = [
    (
        LogitsProblem(4 * 3, 3 * 64, 150, 24, 64, compressed=True, batches=4, page=64, pages=7, packed=True),
        IndexerConfig(2, 2, linear=True, warpgroups=2),
        2,
    ),
    (
        LogitsProblem(
            5, 9 * 16, 144, 64, 128, compressed=True, batches=5, page=16, pages=50, joined=True, packed=True
        ),
        IndexerConfig(1, 3, tensor_sums=True, banks=1, warpgroups=2),
        3,
    ),
    (
        LogitsProblem(3, 4 * 32, 128, 8, 32, compressed=True, batches=3, page=32, pages=12, packed=True),
        IndexerConfig(4, 5, warpgroups=2),
        1,
    ),
]


@pytest.mark.parametrize(("p", "config", "grid"), PACKED, ids=str)
def test_keys_in_fp4_on_a_cpu(tmp_path: Path, p: LogitsProblem, config: IndexerConfig, grid: int) -> None:
    """Any bits, scales up to 2**20 apart: expanded as `fp4.expand` says."""
    rng = np.random.default_rng(0)
    requests, width = p.batches, p.keys // p.page
    tokens = p.tokens // requests
    lens = np.sort(rng.integers(0, p.keys + 1, (requests, tokens)), axis=1).astype(np.int32)
    lens[0], lens[1], lens[2, :] = 0, p.keys, 1
    tables = np.stack([rng.permutation(p.pages)[:width] for _ in range(requests)]).astype(np.int32)
    values = rng.integers(0, 256, (p.pages, p.page, p.depth // 2)).astype(np.uint8)
    values[:, ::3, :16] &= 0x88
    codes = rng.integers(100, 121, (p.pages, p.page, 4)).astype(np.uint8)
    codes[tables[1, 0], 3, 0] = 255
    words = codes.view(np.int32)[..., 0]
    expanded, scales = (np.asarray(x) for x in fp4.expand(jnp.asarray(values), jnp.asarray(words)))
    q = normal(0, requests, tokens, p.heads, p.depth).astype(E4M3)
    weights = normal(2, requests, tokens, p.heads, dtype=jnp.float32)
    cache = [bytes_of(jnp.asarray(values), jnp.asarray(words))] if p.joined else [values, words]
    prepared = [np.asarray(x) for x in prepare_paged(q, *cache, weights, 0 * lens, lens, tables)]
    got = native_logits.run(
        tmp_path, p, config, prepared, np.full((p.tokens, p.columns), 7, np.float32), grid
    )
    keys = expanded.astype(np.float64) * scales[..., None]
    want = np.concatenate(
        [
            exact(q[b], keys[tables[b]].reshape(-1, p.depth), weights[b], 0 * lens[b], lens[b], p.columns)
            for b in range(requests)
        ]
    )
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert np.isnan(want).any()
    assert calc_diff(got, want) < (5e-6 if config.tensor_sums or config.linear else 1e-10)


def test_rows_of_keys_in_fp4_on_a_cpu(tmp_path: Path) -> None:
    """Keys one behind the other, in windows of all kinds, beyond the last key too."""
    p, config = LogitsProblem(3, 300, 300, 40, 64, packed=True), IndexerConfig(1, 3, warpgroups=2)
    q, _, _, weights, start, end = operands(LogitsProblem(3, 300, 300, 40, 64), shift=9)
    keys = random(1, p.keys, p.depth)
    prepared = [np.asarray(x) for x in prepare_packed(q, keys.values, words(keys), weights, start, end)]
    got = native_logits.run(tmp_path, p, config, prepared, np.full((3, 300), 7, np.float32), 2)
    want = exact(q, meant(keys), weights, start, end)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    assert calc_diff(got, want) < 1e-10
    many = prepare_packed(q.repeat(3, 0), keys.values, words(keys), weights.repeat(3, 0), start, end)
    assert many[1].dtype == E4M3


OF_TOKENS = [
    (
        LogitsProblem(90, 3 * 64, 150, 64, 64, compressed=True, batches=5, page=64, pages=9, of_tokens=True),
        IndexerConfig(1, 2, linear=True, warpgroups=2),
        3,
        "runs",
    ),
    (
        LogitsProblem(
            23, 9 * 16, 144, 8, 32, compressed=True, batches=5, page=16, pages=50, joined=True, of_tokens=True
        ),
        IndexerConfig(2, 2),
        2,
        "any order",
    ),
]


@pytest.mark.parametrize(("p", "config", "grid", "order"), OF_TOKENS, ids=str)
def test_tokens_of_requests_on_a_cpu(
    tmp_path: Path, p: LogitsProblem, config: IndexerConfig, grid: int, order: str
) -> None:
    """Requests of no token, of one, and of more than are looked back at; tokens of nobody."""
    rng = np.random.default_rng(0)
    whose = np.sort(rng.choice([0, 2, 3, 4], p.tokens, p=[0.6, 0.3, 0.05, 0.05])).astype(np.int32)
    if order == "any order":
        whose = rng.permutation(whose)
    whose[5], whose[9] = -(2**31), 5
    lens = rng.integers(0, p.keys + 9, p.tokens).astype(np.int32)
    lens[0], lens[1] = 0, p.keys
    tables = np.stack([rng.permutation(p.pages)[: p.keys // p.page] for _ in range(p.batches)]).astype(
        np.int32
    )
    tables[0, 1], tables[3, 0], tables[1] = -1, 2**31 - 1, 2**31 - 1  # some outside of the cache
    q = normal(0, p.tokens, 1, p.heads, p.depth).astype(E4M3)
    values = np.asarray(normal(1, p.pages, p.page, p.depth).astype(E4M3))
    scales = rng.uniform(0.5, 2, (p.pages, p.page)).astype(np.float32)
    weights = normal(2, p.tokens, 1, p.heads, dtype=jnp.float32)
    cache = [bytes_of(jnp.asarray(values), jnp.asarray(scales))] if p.joined else [values, scales]
    given = q, *cache, weights, 0 * lens[:, None], lens[:, None], tables, whose
    prepared = [np.asarray(x) for x in prepare_tokens(*map(jnp.asarray, given))]
    out = np.full((p.tokens, p.columns), 7, np.float32)
    got = native_logits.run(tmp_path, p, config, prepared, out, grid)
    keys = np.concatenate([values.astype(np.float64) * scales[..., None], np.zeros((1, p.page, p.depth))])
    own = np.where((tables >= 0) & (tables < p.pages), tables, p.pages)
    there = (whose >= 0) & (whose < p.batches)
    want = [
        exact(q[i], keys[own[whose[i] if there[i] else 1]].reshape(-1, p.depth), weights[i],
              [0], lens[i : i + 1] * there[i], p.columns)
        for i in range(p.tokens)
    ]  # fmt: skip
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(np.concatenate(want)))
    assert calc_diff(got, np.concatenate(want)) < (5e-6 if config.linear else 1e-10)


def _exact(p: LogitsProblem, q: Any, k: Any, *rest: Any) -> np.ndarray:
    k = np.asarray(k).astype(np.float64)
    if p.is_fp8:
        scales, *rest = rest
        k = k * np.asarray(scales)[:, None]
    return exact(q, k, *rest, p.columns if p.compressed else None)


PROBLEMS = [
    LogitsProblem(8192, 65536, 65536, 64, 128),
    LogitsProblem(8192, 65536, 65536, 32, 128),
    LogitsProblem(64, 4096, 4096, 128, 128, out="bfloat16"),
    LogitsProblem(64, 4096, 4096, 9, 64, compressed=True),
    LogitsProblem(64, 4096, 4096, 40, 32),
    LogitsProblem(64, 4096, 4096, 64, 128, "bf16"),
    LogitsProblem(64, 4096, 4096, 1, 128, "bf16"),
    LogitsProblem(64, 8192, 8192, 64, 128, compressed=True, batches=64, page=64, pages=9000, joined=True),
    LogitsProblem(64 * 4, 8192, 8192, 64, 128, compressed=True, batches=64, page=16, pages=9000),
    LogitsProblem(64, 8192, 8192, 64, 128, compressed=True, batches=64, page=64, pages=9000, packed=True),
    LogitsProblem(
        64 * 4,
        8192,
        8192,
        32,
        128,
        compressed=True,
        batches=64,
        page=16,
        pages=9000,
        joined=True,
        packed=True,
    ),
    LogitsProblem(8, 8192, 8192, 24, 64, compressed=True, batches=8, page=128, pages=9000, packed=True),
    LogitsProblem(3, 8192, 8192, 64, 128, packed=True),
    LogitsProblem(200, 8192, 8192, 64, 128, compressed=True, batches=64, page=64, pages=9000, joined=True,
                  of_tokens=True),
]  # fmt: skip


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_products_overlap_sums(p: LogitsProblem) -> None:
    """No spills, and nothing that ptxas serialises."""
    pytest.importorskip("cuda.core")
    config = FAMILY.cheapest(p, H200)
    for sums in (False, True):
        config = dataclasses.replace(config, tensor_sums=sums and p.heads % 16 == 0, linear=False)
        source = sm90.kernel_source(p, config)
        assert not compile_kernel(source).report.problems()
    assert source.shared_memory <= H200.smem_per_block
    assert list(sm90.candidates(p, H200))
    assert all(not sm90.problems_with(p, one) for one in sm90.candidates(p, H200))


def test_the_text_gives_every_field() -> None:
    text = sm90.kernel_source(PROBLEMS[0], IndexerConfig(2, 8)).text
    wanted = fields_of_concept("indexer/config.cuh", "LogitsConfig")
    assert fields_of_struct(text, "Config") == sorted(wanted)


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (IndexerConfig(0, 4), "tokens is 0"),
        (IndexerConfig(3, 4), "192 columns of a bank, at most 128"),
        (IndexerConfig(2, 4, banks=3), "banks is 3"),
        (IndexerConfig(2, 4, warpgroups=1), "warpgroups is 1"),
        (IndexerConfig(2, 1), "stages is 1"),
        (IndexerConfig(2, 4, 1), "query_stages is 1"),
        (IndexerConfig(2, 16), "bytes of shared memory"),
    ],
)
def test_rules(config: IndexerConfig, rule: str) -> None:
    assert any(rule in line for line in FAMILY.broken_rules(PROBLEMS[0], config, H200))


@pytest.mark.parametrize("heads", [8, 32, 64])
def test_keys_in_fp4_are_summed_as_others(heads: int) -> None:
    """So that what is chosen among keys that were expanded before are the best of these logits."""
    for tokens, keys in itertools.product(range(1, 256 // heads + 1), (1000, 65536)):
        p = LogitsProblem(tokens, keys, keys, heads, 128)
        plain, packed = (FAMILY.cheapest(one, H200) for one in (p, dataclasses.replace(p, packed=True)))
        assert (packed.linear, packed.tensor_sums) == (plain.linear, plain.tensor_sums)


def test_choice_follows_the_tokens() -> None:
    """Many tokens fill the banks; one does not pay for others."""
    assert FAMILY.cheapest(PROBLEMS[0], H200).tokens == 2
    assert FAMILY.cheapest(LogitsProblem(1, 65536, 65536, 32, 128), H200).tokens == 1
    assert FAMILY.kernels_of("9.0a").refusal(LogitsProblem(1, 1, 1, 129, 128))
    assert FAMILY.kernels_of("9.0a").refusal(LogitsProblem(1, 2**31, 1, 8, 128))
