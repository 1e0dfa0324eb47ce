"""Scores that are filtered as they are made, without a GPU: kernels run on the CPU, a thread for each of a
block's; launches are in bounds."""

from __future__ import annotations

import functools
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm.core.chip import H200
from jax_deepgemm.indexer import IndexerConfig, indexer_topk
from jax_deepgemm.jit import compile_kernel
from jax_deepgemm.ops.indexer.family import LogitsProblem
from jax_deepgemm.ops.indexer.prepare import prepare
from jax_deepgemm.ops.indexer_topk import fused, rows
from jax_deepgemm.ops.indexer_topk.family import FAMILY, IndexerTopkProblem
from jax_deepgemm.ops.indexer_topk.filter import SEGMENTS, STRIDE, filter_of, sample_of
from tests.shared import native_logits
from tests.shared.indexer_topk_oracle import operands, windows

pytestmark = pytest.mark.any_version

NATIVE = Path(__file__).parents[1] / "shared" / "native"
DEVICE_CODE = Path(jax_deepgemm.__file__).parent / "include"
LOWEST = np.finfo(np.float32).min


def filtered(
    folder: Path, given: list[Any], bounds: np.ndarray, places: int, c: IndexerConfig, grid: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers and keys [s, 8, places], and counts [s, 3, 8], that the kernel writes."""
    tokens, (heads, depth), keys = len(bounds), given[0].shape[1:], given[1].shape[0]
    p = LogitsProblem(tokens, keys, keys, heads, depth)
    shape = tokens, SEGMENTS, places
    numbers, found = np.full(shape, 7, np.float32), np.full(shape, -7, np.int32)
    counts = np.zeros((tokens, 3, SEGMENTS), np.int32)
    source = fused.logits_source(p, c, "kCandidates")
    prepared = [np.asarray(x) for x in prepare(True, *given)]
    more = bounds, numbers, found, counts, bounds.shape[1], places
    out = np.full(1, 7, np.float32)
    assert native_logits.run(folder, p, c, prepared, out, grid, source, more) == 7
    return numbers, found, counts


def every_score(given: list[Any]) -> np.ndarray:
    return np.asarray(jax_deepgemm.indexer.mqa_logits(given[0], (given[1], given[2]), *given[3:]))


def by_kernel(folder: Path, given: list[Any], c: IndexerConfig) -> np.ndarray:
    """The same by the kernel that writes all of them."""
    s, (n, d) = given[0].shape[0], given[1].shape
    p = LogitsProblem(s, n, n, given[0].shape[1], d)
    prepared = [np.asarray(x) for x in prepare(True, *given)]
    return native_logits.run(folder, p, c, prepared, np.full((s, n), 7, np.float32), 2)


CASES = [
    (11, 400, 24, 32, IndexerConfig(3, 3, warpgroups=2), 3, 64),
    (5, 300, 32, 64, IndexerConfig(2, 2, warpgroups=2, linear=True), 2, 64),
    (3, 2000, 8, 32, IndexerConfig(4, 3, warpgroups=2), 5, 64),
]


@pytest.mark.parametrize(("s", "n", "h", "d", "config", "grid", "places"), CASES, ids=str)
def test_candidates_on_a_cpu(tmp_path, s, n, h, d, config, grid, places):
    """Bounds of everything, of nothing, and of some; pieces of tokens; a segment that is too short."""
    given = [*operands("mixed", s, n, h, d), *windows(s, n)]
    logits = by_kernel(tmp_path, given, config) if config.linear else every_score(given)
    finite = np.where(np.isinf(logits), np.nan, logits)
    bounds = np.full((s, 2), np.inf, np.float32)
    bounds[:, 1] = [np.nanquantile(row, 0.8) if np.isfinite(row).any() else 0 for row in finite]
    bounds[1::5, 1], bounds[2::5, 1] = -np.inf, 3e38
    numbers, keys, counts = filtered(tmp_path, given, bounds, places, config, grid)
    middle = 0
    for i in range(s):
        want = np.flatnonzero(finite[i] >= max(bounds[i, 1], LOWEST))
        if counts[i, 2].any():
            middle += 1
            continue
        assert counts[i].sum() == len(want)
        got = []
        for segment, (front, back) in enumerate(counts[i, :2].T):
            own = keys[i, segment], numbers[i, segment]
            if front + back > places:
                continue
            untouched = slice(front, places - back)
            assert (own[0][untouched] == -7).all()
            assert (own[1][untouched] == 7).all()
            taken = np.r_[0:front, places - back : places]
            np.testing.assert_array_equal(own[1][taken], logits[i, own[0][taken]])
            got += list(own[0][taken])
        if (counts[i, 0] + counts[i, 1] <= places).all():
            assert sorted(got) == list(want)
    assert (middle > 0) == (grid == 5)  # only there tokens are in more than two pieces


def test_a_segment_that_is_full_is_not_left(tmp_path):
    """More candidates than places: they are counted, and nothing is written outside."""
    given = [*operands("equal", 2, 700, 8, 32), *windows(2, 700)]
    bounds = np.full((2, 1), -np.inf, np.float32)
    config = IndexerConfig(1, 3, banks=1, warpgroups=2)
    numbers, keys, counts = filtered(tmp_path, given, bounds, 32, config, 1)
    assert counts[0].sum() == 700
    assert (counts[0].sum(axis=0) > 32).all()
    written = keys[0][keys[0] >= 0]
    np.testing.assert_array_equal(numbers[0][keys[0] >= 0], every_score(given)[0, written])


@functools.cache
def rows_program(folder: Path) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++20", "-Og", "-pthread", "-fsanitize=thread", "-Wno-unknown-pragmas"]
    include = [f"-I{NATIVE / 'blocks'}", f"-I{DEVICE_CODE}"]
    subprocess.run([compiler, *flags, *include, NATIVE / "rows.cc", "-o", folder / "rows"], check=True)
    return folder / "rows"


def test_rows_on_a_cpu(tmp_path):
    """Candidates in order of their keys; tokens whose candidates are too many, too few, or in the middle."""
    tokens, pitch, places, keys, wanted, listed, k = 5, 3, 32, 3000, 20, 2, 5
    rng = np.random.default_rng(0)
    bounds = np.full((tokens, pitch), -5.0, np.float32)
    numbers = rng.standard_normal((tokens, SEGMENTS, places)).astype(np.float32)
    found = np.full((tokens, SEGMENTS, places), -7, np.int32)
    counts = np.zeros((tokens, 3, SEGMENTS), np.int32)
    for i in range(tokens):
        counts[i, 0] = rng.integers(0, places // 2, SEGMENTS)
        counts[i, 1] = rng.integers(0, places // 2, SEGMENTS)
        found[i] = rng.permutation(keys)[: SEGMENTS * places].reshape(SEGMENTS, places)
    counts[0, 0, 3], counts[0, 1, 3] = 20, 13  # more than there are places
    counts[1], bounds[1, -1] = 0, np.inf  # too few
    counts[2], bounds[2, -1] = 0, -np.inf  # all that there are
    counts[3, 2, 5] = 1  # in the middle
    counts[4, 0], counts[4, 1] = places, 0  # as many as there are places
    head = np.array([tokens, pitch, places, keys, wanted, listed, k], np.int32)
    parts = [head, bounds.view(np.int32), numbers.view(np.int32), found, counts]
    np.concatenate([x.reshape(-1) for x in parts]).tofile(tmp_path / "in")
    done = subprocess.run(
        [rows_program(tmp_path), tmp_path / "in"], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    ends, bits, ordered, count, chosen, scores, kept = (
        np.array(line.split(), np.int64).astype(np.int32) for line in done.stdout.splitlines()
    )
    lost = [0, 1, 3]
    assert count == len(lost)
    ordered, bits = ordered.reshape(tokens, -1), bits.view(np.float32).reshape(tokens, -1)
    for i in range(tokens):
        mine = [
            (found[i, s, j], numbers[i, s, j])
            for s in range(SEGMENTS)
            for j in np.r_[0 : counts[i, 0, s], places - counts[i, 1, s] : places]
        ]
        if i in lost:
            assert ends[i] == 0
            continue
        assert ends[i] == len(mine)
        want = sorted(mine)
        np.testing.assert_array_equal(ordered[i, : len(mine)], [key for key, _ in want])
        np.testing.assert_array_equal(bits[i, : len(mine)], np.array([x for _, x in want], np.float32))
    columns = np.arange(k) - 1
    want = np.where(columns < 0, -1, ordered[:, np.maximum(columns, 0)])
    np.testing.assert_array_equal(chosen.reshape(tokens, k), want)
    scores, kept = scores.reshape(tokens, k), kept.reshape(tokens, k)
    for i in range(tokens):
        np.testing.assert_array_equal(scores[i], i if i in lost else -1)
        np.testing.assert_array_equal(kept[i], np.arange(k) if i in lost else -1)


@pytest.mark.parametrize("k", [1, 64, 512, 2048])
def test_bounds_are_right_mostly(k):
    """Of normal scores: more than k candidates, and not more than there are places for, in every segment."""
    rng = np.random.default_rng(k)
    n, f = 65_536, filter_of(k)
    lost = 0
    for _ in range(100):
        x = rng.standard_normal(n).astype(np.float32)
        sample = x[(np.arange(n // STRIDE) * STRIDE) + rng.integers(0, STRIDE, n // STRIDE)]
        taken = np.flatnonzero(x >= np.sort(sample)[-f.rank])
        segments = np.bincount(taken % 128 // 16, minlength=SEGMENTS)
        lost += len(taken) < k or segments.max() > f.places
    assert lost <= 1


def test_samples_are_of_the_window():
    k, scales, start, end = jnp.arange(1000)[:, None], jnp.arange(1000.0), *windows(40, 1000)
    keys, own, first, last = sample_of(k, scales, start, end)
    np.testing.assert_array_equal(keys[:, 0], own)
    np.testing.assert_array_equal(keys[:, 0] // STRIDE, np.arange(1000 // STRIDE))
    assert len(np.unique(keys % STRIDE)) > STRIDE // 2
    for i in range(40):
        inside = np.asarray(keys[first[i] : last[i], 0])
        assert ((inside >= start[i]) & (inside < end[i])).all()
        assert len(inside) >= (int(end[i]) - int(start[i])) // STRIDE - 1


PROBLEM = IndexerTopkProblem(8192, 65536, 64, 128, 2048, sampled=4096)
PROBLEMS = [
    PROBLEM,
    IndexerTopkProblem(2100, 40_000, 32, 128, 512, by_index=True, scratch=1 << 24, sampled=2500),
    IndexerTopkProblem(37, 5000, 20, 64, 8, scratch=1 << 18, sampled=312),
]


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_kernels_have_no_spills(p):
    pytest.importorskip("cuda.core")
    for source in FAMILY.sources(p, H200):
        assert not compile_kernel(source).report.problems(), source.name
        assert source.shared_memory <= H200.smem_per_block


def test_what_is_launched():
    """The launches of two parts; buffers that are large enough are what plans check themselves."""
    pytest.importorskip("cuda.core")
    pytest.importorskip("jax_deepgemm._ffi")

    def text(tokens: int, keys: int, **options: Any) -> str:
        given = jax.eval_shape(lambda: [*operands("mixed", tokens, keys, 32, 64), *windows(tokens, keys)])
        run = jax.jit(lambda q, k, s, *rest: indexer_topk(q, (k, s), *rest, 40, **options))
        return run.trace(*given).lower(lowering_platforms=("cuda",)).as_text()

    for options in ({"fused": True}, {"fused": True, "scratch_bytes": 1 << 20}):
        program = text(600, 5000, **options)
        assert "_candidates@" in program
        assert program.count("@jax_deepgemm_launch(") == 1
    assert "_candidates@" not in text(600, 5000)


def test_limits():
    assert not fused.refusal(PROBLEM)
    far = replace(PROBLEM, keys=1 << 20, sampled=1 << 16)
    assert "launches, at most 256; give it more scratch_bytes" in fused.refusal(far)
    assert not fused.refusal(replace(far, scratch=1 << 30))
    assert "2^31 - 1 places" in fused.refusal(replace(PROBLEM, tokens=1 << 20, scratch=1 << 40))
    assert rows.shared_bytes(512, 1 << 20) <= H200.smem_per_block
    assert fused.config_of(IndexerConfig(16, 4)) == IndexerConfig(4, 4, warpgroups=2)


def test_errors():
    given = [*operands("mixed", 4, 8), *windows(4, 8)]
    with pytest.raises(ValueError, match="fused is True and there are 8 keys, need 16"):
        indexer_topk(given[0], (given[1], given[2]), *given[3:], 2, fused=True)
    with pytest.raises(TypeError, match="fused is 1, need True or False"):
        indexer_topk(given[0], (given[1], given[2]), *given[3:], 2, fused=1)
