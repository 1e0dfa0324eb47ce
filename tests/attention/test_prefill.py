"""The prefill kernel: its source run on a CPU against the formula, and what is chosen and refused before."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.jit import compile_kernel
from jax_deepgemm.ops.attention.problem import AttentionProblem
from jax_deepgemm.ops.attention.sm90 import kernels, prefill
from tests.shared import native_prefill, prefill_oracle
from tests.shared.device_code import fields_of_concept, fields_of_struct

pytestmark = pytest.mark.any_version

SMALL = AttentionProblem(
    tokens=60,
    seqs=5,
    table_pages=6,
    pages=20,
    page=16,
    layers=2,
    heads=6,
    kv_heads=2,
    depth=16,
    v_depth=16,
    scale=0.25,
)
CASES = {
    "window": (
        dataclasses.replace(
            SMALL,
            depth=128,
            v_depth=80,
            page=32,
            table_pages=3,
            q_dtype="f16",
            kv_dtype="f16",
            window=20,
            with_sinks=True,
            max_q_len=45,
        ),
        prefill.PrefillConfig(keys=48, stages=2, decode_rows=9, consumers=3),
    ),
    "full": (
        dataclasses.replace(
            SMALL, heads=5, kv_heads=1, kv_dtype="e4m3", causal=False, softcap=3.0, with_slopes=True
        ),
        prefill.PrefillConfig(keys=32, stages=2, packed_stages=3, ping_pong=True),
    ),
}
BATCHES = (
    (((46, 93), (3, 96), (5, 96), (0, 5), (6, 4)), 0.0),
    (((2, 2), (9, 0), (1, 40), (17, 61), (30, 31)), 0.4),
)
"""Queries and keys of sequences, and how many pages are missing."""
WHOLE = ((12, 90), (12, 30), (12, 12), (12, 12), (12, 12)), 0.0
MOST, LEAST = 2**31 - 1, -(2**31)


def same(results: Any, wanted: Any, rows: Any) -> None:
    out, lse = (x[rows] for x in results)
    np.testing.assert_allclose(out.astype(float), wanted[0][rows], atol=0.02, rtol=0.01)
    np.testing.assert_allclose(lse, wanted[1][rows], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_kernel_attends(case: str, tmp_path: Path) -> None:
    """What it does not write stays NaN; lengths that break the rules lead nowhere out of bounds."""
    p, c = CASES[case]
    drawn = [
        prefill_oracle.draw(p, lengths, seed, missing)
        for seed, (lengths, missing) in enumerate((*BATCHES, WHOLE))
    ]
    wanted = [prefill_oracle.attend(p, operands) for operands in drawn[:3]]
    if case == "window":
        drawn[2]["cu_q_lens"] = np.array([LEAST, 12, 24, 20, MOST, MOST], np.int32)  # the first one is whole
        drawn[2]["kv_lens"] = np.array([90, MOST, LEAST, 12, 12], np.int32)
    else:
        drawn[2]["layer"] = np.array([MOST], np.int32)
        wanted[2] = prefill_oracle.attend(p, drawn[2])
        assert not wanted[2][0].any()
    results = native_prefill.run(tmp_path, p, c, drawn, grid=2, sanitize=case == "window")
    for operands, found, want in zip(drawn[:2], results, wanted, strict=False):
        ends = operands["cu_q_lens"]
        counts = np.diff(ends, append=p.tokens)
        of = np.repeat(np.append(counts[:-1], 0), counts)  # the last rows are of no sequence
        row = np.arange(p.tokens) - np.repeat(ends, counts)
        most = p.max_q_len or p.tokens
        taken = (np.minimum(of, most) * p.group > c.decode_rows) & (row < most)
        assert np.isnan(found[0][~taken].astype(float)).all()
        assert np.isnan(found[1][~taken]).all()
        same(found, want, taken)
    same(results[2], wanted[2], slice(0, 12))


def test_the_text_gives_every_field() -> None:
    text = prefill.prefill_source(*CASES["full"]).text
    wanted = fields_of_concept("attention/prefill_config.cuh", "PrefillConfig")
    assert fields_of_struct(text, "Config") == sorted(wanted)


@pytest.mark.parametrize("kv_dtype", ["bf16", "e4m3"])
@pytest.mark.parametrize("depth", range(16, 257, 16))
def test_every_depth_has_a_tile(depth: int, kv_dtype: str) -> None:
    for v_depth in {depth, max(depth - 64, 16)}:
        p = dataclasses.replace(SMALL, depth=depth, v_depth=v_depth, kv_dtype=kv_dtype)
        c = prefill.prefill_config(p)
        assert kernels.refusal(p) == ""
        assert prefill.problems_with(p, c) == []
        assert c.stages >= 2
        assert c.keys >= 64
        assert prefill.shared_memory(p, c) <= Chip().smem_per_block


def test_broken_rules_are_told() -> None:
    wide = dataclasses.replace(SMALL, depth=256, v_depth=256)
    said = prefill.problems_with(
        wide, prefill.PrefillConfig(keys=136, stages=1, packed_stages=3, ping_pong=True)
    )
    assert said == [
        "keys is 136, need a multiple of 16 up to 256",
        "stages is 1, need 2 to 8",
        "packed_stages is 3, need 2 to 8 for a cache in e4m3, 0 for another",
        "136 keys by 256 need 230 registers, 2 consumers have 180",
    ]


def test_the_common_kernel_compiles_without_spills() -> None:
    pytest.importorskip("cuda.core")
    p = dataclasses.replace(SMALL, heads=32, kv_heads=8, depth=128, v_depth=128)
    kernel = compile_kernel(prefill.prefill_source(p, prefill.prefill_config(p)))
    assert kernel.report.problems() == ()
    assert kernel.report.registers == 168
