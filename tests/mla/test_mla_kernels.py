"""The kernels of latent attention: their sources run on a CPU against the formula, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.ops.mla import sm90
from jax_deepgemm.ops.mla.family import FAMILY, MlaConfig
from jax_deepgemm.ops.mla.problem import MlaProblem
from tests.shared import mla_oracle, native_mla

pytestmark = pytest.mark.any_version

SMALL = MlaProblem(
    tokens=7,
    heads=24,
    seqs=4,
    columns=8,
    pages=24,
    page=16,
    layers=2,
    depth=192,
    v_depth=128,
    scale=0.1,
)
LENGTHS = [(1, 120), (3, 100), (0, 7), (2, 1)]  # the last has a token before all keys
NAMED = dataclasses.replace(SMALL, sparse=True, columns=60, tokens=2, seqs=2, heads=70)
CASES = {
    "pages": (SMALL, MlaConfig(2, 0), 2),
    "split": (
        dataclasses.replace(SMALL, split=64, causal=False, dtype="f16", page=32, columns=4, heads=7),
        MlaConfig(1, 16),
        2,
    ),
    "slots": (NAMED, MlaConfig(2, 7), 2),
}
"""Problem, configuration, teams of blocks."""


def drawn(p: MlaProblem) -> mla_oracle.Operands:
    if p.sparse:
        return mla_oracle.draw_sparse(p, 0)
    return broken(p) if p.causal else mla_oracle.draw(p, LENGTHS, 0, missing=0.2)


def broken(p: MlaProblem) -> mla_oracle.Operands:
    """Lengths beyond every limit, and a sequence that ends before it begins."""
    most, least = 2**31 - 1, -(2**31)
    operands = mla_oracle.draw(p, [(0, 5), (0, 0), (3, p.columns * p.page), (4, 90)], 3)
    operands["cu_q_lens"] = np.array([6, least, 0, 3, most], np.int32)
    operands["kv_lens"] = np.array([5, least, most, 90], np.int32)
    return operands


def test_starts_that_descend_lead_nowhere_out_of_bounds(tmp_path: Path) -> None:
    """Sequences that share rows have more parts than there are slots: rows are right, or zeros."""
    p = dataclasses.replace(SMALL, split=256, seqs=8, columns=19, tokens=2)
    operands = mla_oracle.draw(p, [(2, 300), *[(0, 0)] * 7], 0)
    want, _ = mla_oracle.attend(p, operands)
    for part, evens, odds in (("cu_q_lens", 0, 2), ("kv_lens", 300, 0)):
        operands[part][::2], operands[part][1::2] = evens, odds
    operands["tables"][:] = operands["tables"][0]
    [(out, _)] = native_mla.run(tmp_path, p, MlaConfig(1, 16), [operands], 2)
    found = out.astype(np.float64)
    assert np.minimum(np.abs(found - want), np.abs(found)).max() < 0.02


def test_few_sms_have_small_teams() -> None:
    p = MlaProblem(tokens=64, heads=128, seqs=2, columns=4, pages=8, page=64)
    for sms in (1, 2, 3):
        chip = dataclasses.replace(Chip(), num_sms=sms)
        assert all(c.team <= sms for c, _ in FAMILY.ranked(p, chip))
        assert FAMILY.choose(p, chip).config.team <= sms
    with pytest.raises(ValueError, match="teams of 4 blocks, and 3 SMs may be used"):
        FAMILY.choose(p, chip, MlaConfig(4))


def test_limits() -> None:
    for change, words in (
        ({"heads": 65_536}, "65536 heads, at most 65535"),
        ({"columns": 2**24, "page": 256}, "a table has more keys than a kernel counts"),
    ):
        with pytest.raises(ValueError, match=words):
            FAMILY.choose(dataclasses.replace(SMALL, **change), Chip())


@pytest.mark.parametrize("case", CASES)
def test_kernels_attend(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a row are added by one warp or by eight. One ends at the first access out of bounds."""
    p, c, teams = CASES[case]
    if p.heads > 9:
        monkeypatch.setattr(sm90, "FEW_ROWS", 0)
    operands = drawn(p)
    ((out, lse),) = native_mla.run(tmp_path, p, c, [operands], teams, sanitize=case == "pages")
    want, want_lse = mla_oracle.attend(p, operands)
    np.testing.assert_allclose(out.astype(np.float64), want, atol=0.02, rtol=0.02)
    np.testing.assert_allclose(lse, want_lse, atol=2e-3)
