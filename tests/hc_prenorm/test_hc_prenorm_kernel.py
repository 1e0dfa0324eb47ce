"""The kernels of hc_prenorm_gemm without a GPU: their own source on a CPU, registers, what is chosen."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jax_deepgemm.core.chip import H200
from jax_deepgemm.jit import compile_kernel
from jax_deepgemm.ops.hc_prenorm import sm90
from jax_deepgemm.ops.hc_prenorm.family import FAMILY, HcPrenormConfig, HcPrenormProblem
from jax_deepgemm.ops.hc_prenorm.reference import split_bounds
from tests.shared import native_prenorm
from tests.shared.native_prenorm import Case

pytestmark = pytest.mark.any_version

STREAMS = 28672


def case(m: int, n: int, k: int, num_splits: int = 0, **config: int) -> Case:
    """Small integers, whose sums are exact in any order."""
    rng = np.random.default_rng(m)
    a = rng.integers(-4, 5, (m, k)).astype(ml_dtypes.bfloat16)
    b = rng.integers(-4, 5, (n, k)).astype(np.float32)
    return Case(HcPrenormProblem(m, n, k, num_splits), HcPrenormConfig(**config), a.view(np.uint16), b)


CASES = [
    case(70, 7, 328, rows=64, groups=2, stages=4, splits=2),
    case(130, 24, 456, rows=128, groups=1, stages=2, splits=1),
    case(3, 12, 592, rows=64, groups=4, stages=4, splits=1),
    case(5, 8, 200, 6, rows=64, groups=1, stages=2, splits=6),
]


def expected(one: Case) -> tuple[np.ndarray, np.ndarray]:
    a, b = one.a.view(ml_dtypes.bfloat16).astype(np.float64), one.b.astype(np.float64)
    if not one.p.num_splits:
        return a @ b.T, (a * a).sum(1)
    cuts = [slice(*bounds) for bounds in split_bounds(one.p.k, one.p.num_splits)]
    return np.stack([a[:, cut] @ b[:, cut].T for cut in cuts]), np.stack(
        [(a[:, cut] ** 2).sum(1) for cut in cuts]
    )


def test_the_kernels_themselves_on_a_cpu(tmp_path: Path) -> None:
    """Tails of rows, columns and k; splits that are added up, returned, and empty; sums of groups."""
    for one, got in zip(CASES, native_prenorm.run(tmp_path, CASES), strict=True):
        for found, want in zip(got, expected(one), strict=True):
            np.testing.assert_array_equal(found, want, str(one.p))


@pytest.mark.parametrize("m", [1, 13, 137, 512, 4096, 8192, 100_000])
def test_what_is_chosen_fits_a_wave_or_is_whole(m: int) -> None:
    p = HcPrenormProblem(m, 24, STREAMS)
    chosen = FAMILY.cheapest(p, H200)
    blocks = sm90.tiles_of(p, chosen) * chosen.splits
    assert FAMILY.broken_rules(p, chosen, H200) == []
    assert blocks <= H200.num_sms or chosen.splits == 1
    assert blocks >= 0.8 * H200.num_sms
    in_flight = chosen.stages * sm90.slot_bytes(p, chosen)
    assert in_flight > 160_000, "or all of a block's bytes are asked for at once"
    assert (2 * m * STREAMS >= sm90.READ_ONCE) == ("once" in sm90.kernel_source(p, chosen).name)


@pytest.mark.parametrize("n", [1, 24, 32, 64, 128, 256])
def test_every_candidate_compiles_without_spills(n: int) -> None:
    p = HcPrenormProblem(4096, n, STREAMS)
    sources = {
        source.name: source
        for c in FAMILY.kernels_for(H200).candidates(p, H200)
        for source in sm90._sources(p, c)
    }
    reports = {name: compile_kernel(source).report for name, source in sources.items()}
    assert len(reports) >= 2
    for name, report in reports.items():
        assert (report.spill_store_bytes, report.local_bytes, report.warnings) == (0, 0, ()), name


@pytest.mark.parametrize(
    ("n", "fields", "rule"),
    [
        (24, (96, 1, 4, 1), "rows is 96, need one of"),
        (24, (64, 3, 3, 1), "groups is 3, need one of"),
        (24, (256, 2, 4, 1), "8 warpgroups, at most 4"),
        (24, (64, 2, 3, 1), "stages is 3, need a multiple of 2"),
        (24, (64, 1, 0, 1), "stages is 0, need 1 to 16"),
        (24, (64, 1, 4, 0), "splits is 0, need 1 to 1024"),
        (128, (64, 4, 4, 1), "128 columns need 128 registers"),
        (24, (256, 1, 16, 1), "bytes of shared memory"),
    ],
)
def test_configurations_that_cannot_be(n: int, fields: tuple[int, int, int, int], rule: str) -> None:
    broken = FAMILY.broken_rules(HcPrenormProblem(100, n, 1024), HcPrenormConfig(*fields), H200)
    assert any(rule in one for one in broken), broken


def test_returned_splits_are_the_configuration_s() -> None:
    p = HcPrenormProblem(137, 24, STREAMS, 16)
    assert {c.splits for c, _ in FAMILY.ranked(p, H200)} == {16}
    broken = FAMILY.broken_rules(p, HcPrenormConfig(64, 2, 4, 8), H200)
    assert broken == ["splits is 8, need 16, those that the call returns"]
    assert len(FAMILY.sources(p, H200)) == 1
