"""Grouped SM90 kernels without a GPU: what ptxas says of them, what is chosen, how they are launched."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jax_deepgemm as jdg
from jax_deepgemm.core.chip import H200
from jax_deepgemm.core.launch import Copy, Launch, Operand, Scalar, TensorMap, encode
from jax_deepgemm.jit import CompiledKernel
from jax_deepgemm.ops.gemm.family import GemmConfig
from jax_deepgemm.ops.gemm.sm90.config import passes, shared_memory
from jax_deepgemm.ops.grouped import kernel
from jax_deepgemm.ops.grouped.problem import GroupedProblem
from jax_deepgemm.ops.grouped.sm90.cost import grouped_candidates, grouped_cost
from jax_deepgemm.ops.grouped.sm90.rules import broken_rules
from jax_deepgemm.ops.grouped.sm90.source import grouped_name, grouped_source
from jax_deepgemm.tools.precompile import compile_many
from tests.shared.choosing import choose
from tests.shared.device_code import fields_of_concept, fields_of_struct
from tests.shared.sass import disassemble

pytestmark = pytest.mark.any_version

pytest.importorskip("cuda.core")

BF16, F32, E4, I32 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, jnp.int32
PLAIN: dict[str, Any] = {"a": "bf16", "b": "bf16", "b_scales": "none"}


def problem(grouping: str = "rows", **options: Any) -> GroupedProblem:
    sizes: dict[str, Any] = {"groups": 8, "m": 4096, "n": 4096, "k": 4096, "expected": 512, "segments": 8}
    sizes["m" if grouping == "rows" else "n"] = 4096
    return GroupedProblem(grouping, **{**sizes, "weights": 8, **options})


def inner(**options: Any) -> GroupedProblem:
    return problem("inner", **{"b_scales": "slices", "out": "float32", **options})


def compiled_pairs() -> Iterator[tuple[GroupedProblem, GemmConfig]]:
    """Every tile in its common form, then one of everything else."""
    common = [problem(), problem(**PLAIN), inner(), problem("inner", **PLAIN, layout="tn", out="float32")]
    common.append(inner(b_scales="block_slices", whole_blocks=True))
    for p in common:
        yield from ((p, c) for c in grouped_candidates(p, H200))
    others = [
        problem(b_scales="vector", a="e5m2"),
        problem(n=4099, segmented=True, groups=512, segments=512),
        problem(out="float32"),
        problem(**PLAIN, layout="nn", segmented=True),
        problem("masked_rows", expected=20),
        problem("masked_rows", **PLAIN, zero_rows=True),
        inner(add_c=True, segmented=True),
        inner(out="bfloat16", add_c=True, a="e5m2"),
        inner(b_scales="block_slices", whole_blocks=True, out="bfloat16", add_c=True, segmented=True),
        problem("inner", **PLAIN, layout="tn", out="float32", add_c=True),
        problem("masked_inner", **PLAIN, layout="tn"),
    ]
    yield from ((p, choose(p, H200)) for p in others)


PAIRS = list(compiled_pairs())


@functools.cache
def compiled() -> dict[str, CompiledKernel]:
    return {one.name: one for one in compile_many([grouped_source(*pair) for pair in PAIRS], progress=False)}


@pytest.mark.parametrize(("p", "c"), PAIRS, ids=[grouped_name(*pair) for pair in PAIRS])
def test_ptxas_is_content(p: GroupedProblem, c: GemmConfig) -> None:
    report = compiled()[grouped_name(p, c)].report
    assert report.problems() == ()
    assert report.static_smem_bytes == 0


def test_every_field_of_the_configuration_is_documented() -> None:
    documented = fields_of_concept("grouped/group_table.cuh", "GroupedConfig")
    assert all(len(words) > 8 for words in documented.values()), documented
    text = grouped_source(*PAIRS[0]).text
    assert fields_of_struct(text, "GroupedConfig") == sorted(documented)
    assert fields_of_struct(text, "Config") == sorted(fields_of_concept("gemm/config.cuh", "GemmConfig"))


UNROLLED = [(p, c) for p, c in PAIRS if p.grouping != "inner" and p.b_scales == "block"]
SQUARE = [(p, c) for p, c in PAIRS if p.b_scales == "block_slices"]


def disassembly(p: GroupedProblem, c: GemmConfig) -> list[str]:
    """Instructions and labels, a line each."""
    return disassemble(compiled()[grouped_name(p, c)]).split("\n")


def main_loops(lines: list[str]) -> list[str]:
    """The loops over whole quads: what lies behind the last multiplication, and jumps back, are waits."""
    labels = {line.strip().rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L_")}
    last = max(i for i, line in enumerate(lines) if "GMMA" in line)
    found = []
    for end, line in enumerate(lines[:last]):
        target = re.search(r"BRA `\((\.L_\w+)\)", line)
        body = "\n".join(lines[labels[target[1]] : end]) if target else ""
        if body.count("GMMA") >= 16:
            found.append(body)
    return found


@pytest.mark.parametrize(("p", "c"), UNROLLED, ids=[grouped_name(*pair) for pair in UNROLLED])
def test_main_loop_is_uniform(p: GroupedProblem, c: GemmConfig) -> None:
    """Descriptors come from uniform registers, and no warp is synchronised before it multiplies."""
    loops = main_loops(disassembly(p, c))
    assert len(loops) == passes(p.gemm, c)  # with two passes also half a tile, in one
    for loop in loops:
        assert loop.count("R2UR") < 12  # of 128x128 scales: 4 for each 128-block and quad
        assert "WARPSYNC" not in loop


@pytest.mark.parametrize(("p", "c"), SQUARE, ids=[grouped_name(*pair) for pair in SQUARE])
def test_main_loop_of_square_scales_has_one_instruction_for_each_product(
    p: GroupedProblem, c: GemmConfig
) -> None:
    [loop] = main_loops(disassembly(p, c))
    elements = c.rows * c.cols // (128 * c.warpgroups)  # of a thread
    assert loop.count("FFMA") == 4 * elements
    assert loop.count("FMUL") <= 32
    assert loop.count("LDS") <= 32
    assert loop.count("R2UR") < 12
    assert "WARPSYNC" not in loop


@pytest.mark.parametrize(("p", "c"), UNROLLED, ids=[grouped_name(*pair) for pair in UNROLLED])
def test_first_product_stands_under_the_epilogue(p: GroupedProblem, c: GemmConfig) -> None:
    """The last multiplication is the next tile's, and stores stand between it and the wait for it."""
    lines = disassembly(p, c)
    found = re.findall("GMMA|STSM|STG|WARPGROUP.DEPBAR", "\n".join(lines))
    last = len(found) - found[::-1].index("GMMA")
    assert found[last - 4 : last] == ["GMMA"] * 4
    assert found[last] in ("STSM", "STG")


def test_equal_sources_for_problems_of_one_kind() -> None:
    p = problem()
    c = choose(p, H200)
    other = problem(groups=5, m=77, n=136, k=999, expected=9, segments=12)
    assert grouped_source(other, c).text == grouped_source(p, c).text


def test_table_of_many_groups_costs_stages() -> None:
    few, many = (choose(problem(**PLAIN, groups=g, segments=g), H200) for g in (8, 2000))
    assert shared_memory(problem(**PLAIN).gemm, few).total <= H200.smem_per_block
    assert many.stages < few.stages or many.slabs < few.slabs or many != few


@pytest.mark.parametrize(
    ("p", "c", "rule"),
    [
        (problem(), GemmConfig(8, 64, 8, True), "swap_ab and split_k are for dense GEMMs"),
        (problem(), GemmConfig(128, 12, 8), "must be 8 to 256 in steps of 8"),
        (inner(b_scales="block_slices"), GemmConfig(128, 192, 4), "must be 128 or 256 where scales of"),
    ],
)
def test_each_rule_has_its_message(p: GroupedProblem, c: GemmConfig, rule: str) -> None:
    assert any(rule in message for message in broken_rules(p, c, H200))


def test_too_many_groups_say_so() -> None:
    with pytest.raises(ValueError, match=r"5000 groups .*the kernel.s table has room for 2048\."):
        choose(problem(groups=5000, segments=5000), H200)


def test_few_rows_take_low_tiles_and_many_take_large_ones() -> None:
    decode = choose(problem("masked_rows", m=1024, expected=20), H200)
    prefill = choose(problem(m=32768, expected=4096), H200)
    assert decode.block_m == 64
    assert prefill.block_m * prefill.block_n >= 128 * 192


# --- plans -------------------------------------------------------------------------------------------


def shape(*dims: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def scalars(launch: Launch) -> list[int]:
    return [int(param.value) for param in launch.params if isinstance(param, Scalar)]


def planned(function: Any, ins: list[Any], out: Any, batch: Any = None, **params: Any) -> Launch:
    plan = function.plan(ins, [out], batch=batch, chip=H200, **params)
    assert len(encode(plan)) > 100
    *copies, launch = plan.steps
    assert all(isinstance(step, Copy) and step.num_bytes == 4 * math.prod(out.shape) for step in copies)
    return launch


def test_groups_that_fit_one_tile_take_it() -> None:
    """So that no weight is read again for a second row tile."""
    heights = [
        choose(problem("masked_rows", groups=32, segments=32, n=6144, expected=rows), H200).rows
        for rows in (192, 256)
    ]
    assert heights == [256, 128]


@pytest.mark.parametrize("block_n", [256, 128])
def test_grid_has_room_for_halves(block_n: int) -> None:
    """Five tiles of 128x256 at most, which may be cut in two, or ten of 128x128."""
    ins = [shape(256, 256, dtype=E4), shape(256, 4, dtype=F32), shape(2, 256, 256, dtype=E4)]
    ins += [shape(2, 2, 4, dtype=F32), shape(2, dtype=I32), shape(1, dtype=I32)]
    config = GemmConfig(128, block_n, 4, slabs=2)
    launch = planned(kernel.m_grouped_fp8_gemm, ins, shape(256, 256), rows_format="sizes", config=config)
    assert launch.grid == (10, 1, 1)


def test_rows_plan() -> None:
    ins = [shape(512, 256, dtype=E4), shape(512, 4, dtype=F32), shape(6, 384, 256, dtype=E4)]
    ins += [shape(6, 3, 4, dtype=F32), shape(24, dtype=I32), shape(1, dtype=I32)]
    launch = planned(kernel.m_grouped_fp8_gemm, ins, shape(512, 384), rows_format="sizes", expected_m=60)
    maps = [param for param in launch.params if isinstance(param, TensorMap)]
    assert [m.dims for m in maps] == [(256, 512, 1), (256, 384, 6), (4, 512, 1), (4, 3, 6), (384, 512, 1)]
    m, n, k_blocks, _, total, here, _, extent = scalars(launch)
    assert (m, n, k_blocks, total, here, extent) == (512, 384, 2, 24, 6, 512)
    assert [p.index for p in launch.params if isinstance(p, Operand)] == [4, 5]


def test_segments_come_in_threes() -> None:
    ins = [shape(512, 256), shape(6, 384, 256), shape(72, dtype=I32), shape(1, dtype=I32)]
    launch = planned(kernel.m_grouped_bf16_gemm, ins, shape(512, 384), layout="nt", rows_format="segments")
    assert scalars(launch)[4:6] == [24, 6]
    batched = planned(kernel.m_grouped_bf16_gemm, ins, shape(2, 256, 384), batch=(True,) * 4, layout="nt")
    assert scalars(batched)[:2] == [512, 384]


def test_inner_plan_has_a_block_of_scales_per_box() -> None:
    ins = [shape(256, 1024, dtype=E4), shape(8, 256, dtype=F32), shape(384, 1024, dtype=E4)]
    ins += [shape(8, 384, dtype=F32), shape(5, dtype=I32), shape(1, dtype=I32), shape(5, 256, 384, dtype=F32)]
    launch = planned(kernel.k_grouped_fp8_gemm, ins, shape(5, 256, 384, dtype=F32), rows_format="sizes")
    maps = [param for param in launch.params if isinstance(param, TensorMap)]
    assert [m.box[1] for m in maps[2:4]] == [1, 1]
    for out in (jnp.float32, jnp.bfloat16):
        ins[-1] = result = shape(5, 256, 384, dtype=out)
        plan = kernel.k_grouped_fp8_gemm.plan(ins, [result], batch=None, chip=H200, rows_format="sizes")
        assert [type(step) for step in plan.steps] == [Copy] * (out == jnp.float32) + [Launch]
    assert scalars(launch)[-1] == 1024


def test_inner_plan_of_square_scales_has_four_blocks_of_k_per_box() -> None:
    ins = [shape(256, 1024, dtype=E4), shape(8, 256, dtype=F32), shape(640, 1024, dtype=E4)]
    ins += [
        shape(8, 8, dtype=F32),
        shape(5, dtype=I32),
        shape(1, dtype=I32),
    ]  # five blocks of columns, padded
    out = shape(5, 256, 640)
    launch = planned(
        kernel.k_grouped_fp8_gemm, ins, out, rows_format="blocks", config=GemmConfig(128, 256, 4, slabs=2)
    )
    maps = [param for param in launch.params if isinstance(param, TensorMap)]
    assert [(m.dims, m.box) for m in maps[2:4]] == [((256, 8, 1), (128, 4, 1)), ((8, 8, 1), (4, 4, 1))]
    wide = [*ins[:3], shape(8, 640, dtype=F32), *ins[4:]]
    launch = planned(kernel.k_grouped_fp8_gemm, wide, out, rows_format="blocks")
    assert "sb128" not in launch.kernel.name


def test_masked_weights_are_used_in_turn() -> None:
    ins = [shape(12, 64, 256), shape(6, 384, 256), shape(12, dtype=I32)]
    launch = planned(
        kernel.m_masked_bf16_gemm, ins, shape(2, 6, 64, 384), batch=(True, False, True), layout="nt"
    )
    assert scalars(launch)[5:] == [12, 6, 64]


@pytest.mark.parametrize(("rows", "k", "once"), [(20, 4096, True), (20, 1024, False), (192, 4096, False)])
def test_weights_that_meet_few_rows_need_not_stay_in_l2(rows: int, k: int, once: bool) -> None:
    ins = [shape(6, 1024, k), shape(6, 384, k), shape(6, dtype=I32)]
    out = shape(6, 1024, 384)
    launch = planned(kernel.m_masked_bf16_gemm, ins, out, layout="nt", expected_m=rows)
    assert ("once" in launch.kernel.name.split("_")) == once


def test_weights_that_groups_share_stay_in_l2() -> None:
    few: dict[str, Any] = {"groups": 8, "segments": 8, "expected": 20}
    assert problem("masked_rows", **few, weights=8).gemm.b_once
    assert not problem("masked_rows", **few, weights=1).gemm.b_once
    assert problem(**few).gemm.b_once
    assert not problem(**few | {"segments": 64}, segmented=True).gemm.b_once


def test_no_more_groups_are_hit_than_there_are_rows() -> None:
    """What is read is what can have rows, and so are the tiles that the SMs share."""
    sizes: dict[str, Any] = {"n": 4096, "k": 7168, "expected": 1}
    few, as_many = (problem(m=8, groups=g, segments=g, **sizes) for g in (256, 8))
    assert (few.hit, as_many.hit, problem("masked_rows", m=8, groups=256, segments=256).hit) == (8, 8, 256)
    tile = GemmConfig(64, 256, 4, slabs=4)
    assert grouped_cost(few, tile, H200) == grouped_cost(as_many, tile, H200)
    assert few.gemm.b_once  # all 256 matrices would be too large
    assert not problem(m=64, groups=256, segments=256, **sizes).gemm.b_once


def test_a_hint_promises_no_rows_that_are_not_there() -> None:
    ins = [shape(8, 256), shape(6, 384, 256), shape(6, dtype=I32), shape(1, dtype=I32)]
    found = kernel.m_grouped_bf16_gemm.problem(ins, [shape(8, 384)], batch=None, layout="nt", expected_m=100)
    assert found.expected == 8


def test_precompile_takes_grouped_problems() -> None:
    p = problem(**PLAIN)
    [found] = jdg.precompile([p], progress=False)
    assert found.name == grouped_name(p, choose(p, H200))
