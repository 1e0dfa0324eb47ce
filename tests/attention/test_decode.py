"""Attention of few rows on Hopper: its kernels on a CPU against the formula, its configurations, and what the
compiler says of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.jit import compile_kernel
from jax_deepgemm.ops.attention.family import FAMILY, AttentionConfig
from jax_deepgemm.ops.attention.problem import AttentionProblem
from jax_deepgemm.ops.attention.sm90 import decode, kernels
from tests.shared import native_decode, prefill_oracle

pytestmark = pytest.mark.any_version

PROBLEM = AttentionProblem(
    tokens=5, seqs=4, table_pages=20, pages=50, page=16, layers=2, heads=2, kv_heads=1, depth=64, v_depth=64
)
LENGTHS = ((1, 300), (1, 3), (1, 100), (1, 0))


def _problem(**changes: Any) -> AttentionProblem:
    return dataclasses.replace(PROBLEM, scale=0.1, **changes)


Lengths = tuple[tuple[int, int], ...]


def _right(p: AttentionProblem, operands: dict[str, np.ndarray], out: np.ndarray, lse: np.ndarray) -> None:
    want, want_lse = prefill_oracle.attend(p, operands)
    seen = np.isfinite(want_lse)
    assert (np.isfinite(lse) == seen).all()
    assert np.abs(lse[seen] - want_lse[seen]).max() < 2e-4
    assert np.abs(out.astype(np.float64) - want).max() < 0.01 * np.abs(want).max()


def _check(folder: Path, p: AttentionProblem, c: AttentionConfig, lengths: Lengths, shares: int) -> None:
    operands = prefill_oracle.draw(p, lengths, 1)
    [(out, lse)] = native_decode.run(folder, p, c, [(operands, shares)])
    _right(p, operands, out, lse)


def test_decoding(tmp_path: Path) -> None:
    """By blocks that have several units, and by more blocks than there is work; pages are missing."""
    p = _problem()
    calls = [
        (prefill_oracle.draw(p, LENGTHS, i, missing=0.2 * i), shares) for i, shares in enumerate((2, 20))
    ]
    found = native_decode.run(tmp_path, p, AttentionConfig(16, 3, 4, 2), calls)
    for (operands, _), (out, lse) in zip(calls, found, strict=True):
        _right(p, operands, out, lse)


def test_fp8_with_window_and_sinks(tmp_path: Path) -> None:
    """Odd numbers of 16-byte pieces, values narrower than keys, tiles of 32 keys."""
    changes = {"depth": 80, "v_depth": 48, "window": 90, "with_sinks": True, "kv_dtype": "e4m3"}
    p = _problem(**changes, heads=4, kv_heads=2, tokens=6, seqs=3)
    _check(tmp_path, p, AttentionConfig(32, 3, 4, 1), ((1, 300), (3, 130), (2, 2)), 3)


def test_float16_with_slopes(tmp_path: Path) -> None:
    """Several tokens of a sequence, more rows than a tile, full attention."""
    changes = {"q_dtype": "f16", "kv_dtype": "f16", "softcap": 3.0, "with_slopes": True}
    p = _problem(**changes, causal=False, tokens=12, seqs=2)
    _check(tmp_path, p, AttentionConfig(16, 2, 4, 1), ((9, 200), (3, 2)), 3)


def test_parts_have_the_same_bits_in_every_batch(tmp_path: Path) -> None:
    p, c = _problem(split=256, tokens=3, seqs=2), AttentionConfig(16, 2, 4, 1)
    whole = prefill_oracle.draw(p, ((1, 300), (2, 40)), 1)
    alone = {**whole, "cu_q_lens": np.array([0, 1, 1], np.int32)}
    (out, lse), (one, _) = native_decode.run(tmp_path, p, c, [(whole, 4), (alone, 1)])
    _right(p, whole, out, lse)
    assert one[0].tobytes() == out[0].tobytes()
    assert not one[1:].any()


def test_starts_that_descend_lead_nowhere_out_of_bounds(tmp_path: Path) -> None:
    """Sequences that share rows have more parts than there are slots: rows are right, or zeros."""
    p, c = _problem(split=256, tokens=20, seqs=6, pages=20), AttentionConfig(16, 2, 4, 1)
    operands = prefill_oracle.draw(p, ((20, 300), *[(0, 0)] * 5), 1)
    want, _ = prefill_oracle.attend(p, operands)
    for part, evens, odds in (("cu_q_lens", 0, 20), ("kv_lens", 300, 0)):
        operands[part][::2], operands[part][1::2] = evens, odds
    operands["tables"][:] = operands["tables"][0]
    [(out, _)] = native_decode.run(tmp_path, p, c, [(operands, 2)])
    found = out.astype(np.float64)
    assert np.minimum(np.abs(found - want), np.abs(found)).max() < 0.01 * np.abs(want).max()


WIDTHS = (
    (64, 64, "bf16", "bf16"),
    (80, 80, "bf16", "bf16"),
    (128, 128, "bf16", "bf16"),
    (128, 128, "bf16", "e4m3"),
    (192, 128, "bf16", "bf16"),
    (256, 256, "f16", "e4m3"),
)


def _chosen(depth: int, v_depth: int, q: str, kv: str) -> tuple[AttentionProblem, AttentionConfig]:
    p = _problem(depth=depth, v_depth=v_depth, q_dtype=q, kv_dtype=kv)
    return p, FAMILY.choose(p, Chip()).config


@pytest.mark.parametrize(("depth", "v_depth", "q", "kv"), WIDTHS)
def test_what_is_chosen_compiles_without_spills(depth: int, v_depth: int, q: str, kv: str) -> None:
    p, c = _chosen(depth, v_depth, q, kv)
    assert kernels.problems_with(p, c) == []
    for source in (decode.decode_source(p, c), decode.merge_source(p, c)):
        report = compile_kernel(source, arch=Chip().arch).report
        assert report.spill_store_bytes == report.local_bytes == 0, str(report)


def test_enough_is_in_flight() -> None:
    """Of an SM: 64 KiB, what 4.5 TB/s take at the latency of memory."""
    for depth, v_depth, q, kv in WIDTHS:
        p, c = _chosen(depth, v_depth, q, kv)
        assert c.blocks * c.warps * (c.stages - 1) * decode.tile_bytes(p, c) >= 65536, (depth, kv, str(c))


def test_rules() -> None:
    p = _problem(depth=256, v_depth=256)
    found = kernels.problems_with(p, AttentionConfig(32, 9, 3, 4))
    assert [words.split(" is ")[0].split(" ")[0] for words in found] == [
        *("warps", "blocks", "stages", "4", "keys", "4"),
    ]
    with pytest.raises(ValueError, match=r"heads are 264 and 64 wide, need multiples of 16 up to 256: pad"):
        FAMILY.choose(_problem(depth=264), Chip())
    with pytest.raises(ValueError, match=r"tables of 4294967296 keys, at most 2147483647"):
        FAMILY.choose(_problem(page=256, table_pages=2**24), Chip())
    many = _problem(tokens=2**23, seqs=1024, heads=64, kv_heads=8, table_pages=1)
    with pytest.raises(ValueError, match="rows times sequences are more than a launch counts"):
        FAMILY.choose(many, Chip())
    FAMILY.choose(dataclasses.replace(many, tokens=2**22), Chip())


def test_both_kernels_are_launched_where_sequences_may_have_many_rows() -> None:
    few, many = _problem(tokens=900, max_q_len=16), _problem(tokens=900)
    assert [kernels.has_many(p) for p in (few, many)] == [False, True]
    assert len(kernels.KERNELS.sources(many, FAMILY.choose(many, Chip()).config)) == 3
