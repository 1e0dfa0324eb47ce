"""The kernels of latent attention: their sources run on a CPU against the formula, and what is chosen and refused
before."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jax_deepgemm.ops.mla import sm90
from jax_deepgemm.ops.mla.family import MlaConfig
from jax_deepgemm.ops.mla.problem import MlaProblem
from tests.shared import mla_oracle, native_mla

pytestmark = pytest.mark.any_version

SMALL = MlaProblem(
    tokens=8,
    heads=40,
    seqs=4,
    columns=14,
    pages=40,
    page=16,
    layers=2,
    depth=192,
    v_depth=128,
    scale=0.1,
)
LENGTHS = [(1, 201), (4, 150), (0, 7), (2, 1)]  # the last has a token before all keys
NAMED = dataclasses.replace(SMALL, sparse=True, columns=110, tokens=3, seqs=3, heads=70)
CASES = {
    "pages": (SMALL, MlaConfig(64, 2), 3),
    "split": (
        dataclasses.replace(SMALL, split=3, causal=False, dtype="f16", page=32, columns=7, heads=7),
        MlaConfig(32),
        2,
    ),
    "slots": (NAMED, MlaConfig(64), 4),
    "slots in teams": (dataclasses.replace(NAMED, dtype="f16"), MlaConfig(32, 2), 2),
    "full size": (
        dataclasses.replace(SMALL, depth=576, v_depth=512, heads=9, tokens=2, seqs=2, layers=1, max_q_len=1),
        MlaConfig(64),
        2,
    ),
}
"""Problem, configuration, teams of blocks."""


def drawn(p: MlaProblem, lengths: Sequence[tuple[int, int]]) -> list[mla_oracle.Operands]:
    if p.sparse:
        return [mla_oracle.draw_sparse(p, 0)]
    if p.max_q_len:
        return [mla_oracle.draw(p, [(1, 130), (1, 40)], 1)]
    return [mla_oracle.draw(p, lengths, 0), mla_oracle.draw(p, lengths, 1, missing=0.3), broken(p)]


def broken(p: MlaProblem) -> mla_oracle.Operands:
    """Lengths beyond every limit."""
    most, least = 2**31 - 1, -(2**31)
    operands = mla_oracle.draw(p, [(3, 90), (2, p.columns * p.page), (1, 0), (2, 1)], 3)
    operands["cu_q_lens"] = np.array([least, 3, 6, 5, most], np.int32)
    operands["kv_lens"] = np.array([90, most, least, 1], np.int32)
    return operands


@pytest.mark.parametrize("case", CASES)
def test_kernels_attend(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a row are added by one warp or by eight. Two programs end at the first access out of bounds."""
    p, c, teams = CASES[case]
    if p.heads > 9:
        monkeypatch.setattr(sm90, "FEW_ROWS", 0)
    calls = drawn(p, LENGTHS)
    results = native_mla.run(tmp_path, p, c, calls, teams, sanitize=case in ("pages", "slots"))
    for operands, (out, lse) in zip(calls, results, strict=True):
        want, want_lse = mla_oracle.attend(p, operands)
        np.testing.assert_allclose(out.astype(np.float64), want, atol=0.02, rtol=0.02)
        np.testing.assert_allclose(lse, want_lse, atol=2e-3)
