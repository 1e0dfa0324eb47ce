"""Dense GEMMs on an H200: equal bits from run to run, and the same from every kind of configuration.

Run: pytest -m gpu tests/gpu/test_gemm_configs_gpu.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_deepgemm.core.chip import H200
from jax_deepgemm.jit import KernelSource
from jax_deepgemm.ops.gemm.family import GemmConfig
from jax_deepgemm.ops.gemm.problem import GemmProblem
from jax_deepgemm.ops.gemm.sm90.config import fit_stages
from jax_deepgemm.ops.gemm.sm90.cost import _PER_BLOCK, candidates, persistent_tiles
from jax_deepgemm.ops.gemm.sm90.source import kernel_source
from tests.shared import gemm_oracle as oracle
from tests.shared.cases import ROW, Case
from tests.shared.choosing import choose
from tests.shared.gemm_products import bf16_gemm, check_configs, fp8_gemm, problem
from tests.shared.gpu_programs import program

REPEATED = (
    Case(1, 2112, 7168),
    Case(64, 576, 7168),
    Case(128, 4096, 7168),
    Case(4096, 2112, 7168),
    Case(1000, 1030, 4096, out="float32", accumulate=True, b_block=ROW),
)


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_twenty_runs_give_the_same_bits(case):
    word = jnp.uint32 if case.out == "float32" else jnp.uint16
    for run, arrays in ((fp8_gemm, oracle.fp8_operands(case)), (bf16_gemm, oracle.bf16_operands(case))):
        step = program(lambda x, run=run: lax.bitcast_convert_type(run(case, x), word))
        first = step(arrays)
        assert all(bool(jnp.array_equal(step(arrays), first)) for _ in range(20))


def fitted(p: GemmProblem, tiles: Iterable[GemmConfig]) -> list[GemmConfig]:
    """Those that are legal for the problem, with as many stages as fit; at least one."""
    found = [tile for tile in (fit_stages(p, tile, H200) for tile in tiles) if tile is not None]
    assert found
    return found


def four_of_all(p: GemmProblem) -> list[GemmConfig]:
    every = list(candidates(p, H200))
    return [every[i * (len(every) - 1) // 3] for i in range(4)]


def ping_pong(p: GemmProblem) -> list[GemmConfig]:
    return fitted(p, (tile for tile in persistent_tiles(_PER_BLOCK, p) if tile.ping_pong))


def two_parts(p: GemmProblem) -> list[GemmConfig]:
    return fitted(p, (GemmConfig(256, cols, 0) for cols in (96, 112, 128)))


def side_by_side(p: GemmProblem) -> list[GemmConfig]:
    return fitted(p, (GemmConfig(64, cols, 0) for cols in (128, 256)))


def split_k(p: GemmProblem) -> list[GemmConfig]:
    tiles = [
        GemmConfig(rows, cols, 0, split_k=split, blocks_per_sm=resident)
        for rows, cols in ((64, 24), (64, 64), (64, 128), (128, 64))
        for split, resident in ((2, 2), (4, 1), (8, 2))
    ]
    return fitted(p, tiles)


ANY = (Case(24, 584, 1160), Case(200, 584, 1160, out="float32", accumulate=True))
PING_PONG = (
    Case(1000, 1032, 520),
    Case(700, 515, 64, layout="tn"),
    Case(129, 1000, 200, layout="nn", out="float32", accumulate=True),
    Case(300, 904, 1160, layout="tt", accumulate=True),
    Case(1, 8, 8),
)
TWO_PARTS = (
    Case(1000, 1032, 520),
    Case(300, 515, 1160, out="float32", accumulate=True, b_block=ROW),
    Case(513, 904, 1280, out="float32", b_block=ROW),
    Case(1, 8, 16, accumulate=True),
)
SIDE_BY_SIDE = (
    Case(100, 904, 1160),
    Case(70, 515, 640, out="float32", accumulate=True),
    Case(33, 1028, 1024, b_block=ROW, layout="nn"),
    Case(129, 200, 130, out="float32", layout="tt", accumulate=True, b_block=ROW),
)
SPLIT_K = (
    Case(200, 584, 1160),
    Case(70, 515, 2176, out="float32", accumulate=True),
    Case(33, 130, 1024, b_block=ROW, layout="tt"),
    Case(129, 1028, 4100, out="float32", layout="tn"),
)
BOTH = (True, False)


def kernels() -> Iterator[GemmProblem | KernelSource]:
    """What the tests of this file need (kernels.py)."""
    yield from (problem(case, fp8) for case in REPEATED for fp8 in BOTH)
    for kind, case_list, types in (
        (four_of_all, ANY, BOTH),
        (ping_pong, PING_PONG, (False,)),
        (two_parts, TWO_PARTS, (True,)),
        (side_by_side, SIDE_BY_SIDE, BOTH),
        (split_k, SPLIT_K, BOTH),
    ):
        for p in (problem(case, fp8) for case in case_list for fp8 in types):
            yield from (kernel_source(p, config) for config in kind(p))


@pytest.mark.parametrize("fp8", BOTH, ids=("fp8", "bf16"))
@pytest.mark.parametrize("case", ANY, ids=str)
def test_configurations_agree(case, fp8):
    check_configs(case, fp8, four_of_all(problem(case, fp8)))


@pytest.mark.parametrize("num_sms", [1, 3, 132])
@pytest.mark.parametrize("case", PING_PONG, ids=str)
def test_ping_pong(case, num_sms):
    """Many tiles for each SM, one, and none for the second warpgroup."""
    check_configs(case, False, ping_pong(problem(case, False)), num_sms=num_sms)


@pytest.mark.parametrize("num_sms", [1, 3, 132])
@pytest.mark.parametrize("case", TWO_PARTS, ids=str)
def test_two_parts_to_a_warpgroup(case, num_sms):
    check_configs(case, True, two_parts(problem(case, True)), num_sms=num_sms)


@pytest.mark.parametrize("fp8", BOTH, ids=("fp8", "bf16"))
@pytest.mark.parametrize("num_sms", [3, 132])
@pytest.mark.parametrize("case", SIDE_BY_SIDE, ids=str)
def test_two_warpgroups_side_by_side(case, num_sms, fp8):
    check_configs(case, fp8, side_by_side(problem(case, fp8)), num_sms=num_sms)


@pytest.mark.parametrize("fp8", BOTH, ids=("fp8", "bf16"))
@pytest.mark.parametrize("case", SPLIT_K, ids=str)
def test_split_k_without_swap_ab(case, fp8):
    check_configs(case, fp8, split_k(problem(case, fp8)))


@pytest.mark.smoke
def test_num_sms():
    """Fewer SMs, also an odd number of them, give the same bits: tiles are the same, others run them."""
    case = Case(1000, 1024, 512, out="float32")
    arrays = oracle.fp8_operands(case)
    config = choose(problem(case, True), H200)
    full = fp8_gemm(case, arrays, config=config)
    for count in (1, 77, 131):
        np.testing.assert_array_equal(fp8_gemm(case, arrays, config=config, num_sms=count), full)
