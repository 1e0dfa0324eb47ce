"""SM90 kernels without a GPU: what is legal, what is chosen and launched, and what ptxas says of it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_deepgemm as jdg
from jax_deepgemm.core.chip import H200, Chip
from jax_deepgemm.core.family import Given
from jax_deepgemm.core.launch import Copy, Launch, LaunchPlan, Operand, Result, TensorMap
from jax_deepgemm.jit import CompiledKernel, CompileError, KernelSource, compile_kernel
from jax_deepgemm.ops.gemm import kernel, padding
from jax_deepgemm.ops.gemm.family import FAMILY, GemmConfig
from jax_deepgemm.ops.gemm.problem import GemmProblem, ceil_div
from jax_deepgemm.ops.gemm.sm90 import plan as plans
from jax_deepgemm.ops.gemm.sm90.config import fit_stages, problems_with, shared_memory
from jax_deepgemm.ops.gemm.sm90.cost import _PER_BLOCK, candidates, cost, persistent_tiles
from jax_deepgemm.ops.gemm.sm90.source import kernel_name, kernel_source
from jax_deepgemm.tools.precompile import compile_many
from tests.shared import cases
from tests.shared.cases import ROW, Case
from tests.shared.choosing import choose
from tests.shared.device_code import fields_of_concept, fields_of_struct
from tests.shared.launch_plans import FakeKernel

pytestmark = pytest.mark.any_version

pytest.importorskip("cuda.core")

KINDS: dict[str, dict[str, Any]] = {
    "fp8 block": {},
    "fp8 vector": {"b_scales": "vector"},
    "bf16": {"a": "bf16", "b": "bf16", "b_scales": "none"},
}
LARGE = (4096, 4096, 4096)
ODD, UNALIGNED = 4099, 4100  # n: rows of D are 2-byte or 8-byte aligned


def problem(kind: str, m: int = 4096, n: int = 4096, k: int = 4096, **options: Any) -> GemmProblem:
    return GemmProblem(m, n, k, **{**KINDS[kind], **options})


def of_case(case: Case, fp8: bool) -> GemmProblem:
    """The problem of a row of tests/cases.py."""
    names = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
    types = (names[case.a_dtype], names[case.b_dtype]) if fp8 else ("bf16", "bf16")
    scales = ("vector" if case.b_block == ROW else "block") if fp8 else "none"
    layout = "nt" if fp8 else case.layout
    return GemmProblem(case.m, case.n, case.k, *types, layout, case.out, case.accumulate, scales)


# --- what the compiler says ------------------------------------------------------------------------


def swap(tokens: int, weights: int, split: int, resident: int) -> GemmConfig:
    return GemmConfig(tokens, weights, 0, True, split, resident)


def compiled_pairs() -> Iterator[tuple[GemmProblem, GemmConfig]]:
    """Every tile of the persistent kernel in its common form, then one of everything else."""
    for kind in KINDS:
        yield from ((problem(kind), tile) for tile in persistent_tiles(_PER_BLOCK, problem(kind)))
    f32_add: dict[str, Any] = {"out": "float32", "add_c": True}
    yield problem("fp8 block", n=ODD, add_c=True), GemmConfig(128, 128, 0)
    yield problem("fp8 block", **f32_add), GemmConfig(128, 192, 0)
    yield problem("fp8 block", n=UNALIGNED, b="e5m2"), GemmConfig(128, 128, 0)
    yield problem("fp8 vector", a="e5m2", b="e5m2", **f32_add), GemmConfig(128, 160, 0)
    yield problem("bf16", layout="nn"), GemmConfig(128, 256, 0)
    yield problem("bf16", layout="tn", **f32_add), GemmConfig(128, 176, 0)
    yield problem("bf16", layout="tn", **f32_add), GemmConfig(128, 192, 0, ping_pong=True)
    yield problem("bf16", n=ODD, add_c=True), GemmConfig(128, 128, 0, ping_pong=True)
    yield problem("bf16", n=ODD, layout="tt", add_c=True), GemmConfig(128, 128, 0)
    yield problem("fp8 block", 7, a="e5m2"), swap(8, 64, 4, 2)
    yield problem("fp8 block", 100, **f32_add), swap(128, 128, 1, 1)
    yield problem("fp8 vector", 30, n=ODD, add_c=True), swap(32, 128, 2, 1)
    yield problem("bf16", 1), swap(8, 64, 1, 2)
    yield problem("bf16", 60, layout="tn", **f32_add), swap(64, 128, 8, 1)
    yield problem("bf16", 16, n=ODD, layout="nn"), swap(16, 128, 4, 2)
    yield problem("fp8 block", 200), GemmConfig(64, 64, 0, split_k=2)
    yield problem("fp8 vector", 30, n=ODD, **f32_add), GemmConfig(64, 32, 0, split_k=8, blocks_per_sm=2)
    yield problem("bf16", 100, layout="tn", **f32_add), GemmConfig(128, 64, 0, split_k=4)


def fitted(p: GemmProblem, c: GemmConfig) -> GemmConfig:
    found = fit_stages(p, c, H200)
    assert found is not None, f"{c} does not fit"
    return found


PAIRS = [(p, fitted(p, c)) for p, c in compiled_pairs()]


@functools.cache
def compiled() -> dict[str, CompiledKernel]:
    """All of PAIRS, at once and in parallel."""
    return {one.name: one for one in compile_many([kernel_source(*pair) for pair in PAIRS], progress=False)}


def test_pairs_are_few_and_different() -> None:
    assert len({kernel_name(*pair) for pair in PAIRS}) == len(PAIRS) <= 64


@pytest.mark.parametrize(("p", "c"), PAIRS, ids=[kernel_name(*pair) for pair in PAIRS])
def test_ptxas_is_content(p: GemmProblem, c: GemmConfig) -> None:
    report = compiled()[kernel_name(p, c)].report
    assert report.problems() == ()
    assert report.static_smem_bytes == 0
    allocated = ceil_div(report.registers, 8) * 8 * ceil_div(c.threads, 32) * 32 * c.blocks_per_sm
    assert allocated <= 65_536, f"{report.registers} registers: {c.blocks_per_sm} blocks do not fit an SM"


def test_shared_memory_is_what_the_kernels_lay_out() -> None:
    """`Layout` of ring.cuh, rounded up to 128 bytes, for every configuration above."""
    text = ["#include <jax_deepgemm/gemm/mainloop.cuh>"]
    for i, (p, c) in enumerate(PAIRS):
        [config] = re.findall(r"struct Config \{\n(.*?)\n\};", kernel_source(p, c).text, re.DOTALL)
        text.append(f"struct Config{i} {{\n{config.replace('using Mma = ::Mma;', '')}\n}};")
        expected = shared_memory(p, c).total
        text.append(f"static_assert(jdg::align_up(jdg::Layout<Config{i}>::kBytes, 128) == {expected});")
    compile_kernel(KernelSource("layouts", "\n".join([*text, 'extern "C" __global__ void layouts() {}'])))


def test_every_field_of_the_configuration_is_documented() -> None:
    """In gemm/config.cuh: no field is missing there, and none stands there that kernels do not have."""
    documented = fields_of_concept("gemm/config.cuh", "GemmConfig")
    assert all(len(words) > 8 for words in documented.values()), documented
    for pair in (PAIRS[0], PAIRS[-1]):
        assert fields_of_struct(kernel_source(*pair).text, "Config") == sorted(documented)


def test_a_missing_field_does_not_compile() -> None:
    source = kernel_source(*PAIRS[0])
    text = source.text.replace(", ACROSS = 1", "")
    assert text != source.text
    with pytest.raises(CompileError, match="GemmConfig"):
        compile_kernel(dataclasses.replace(source, text=text))


@pytest.mark.parametrize("pair", [PAIRS[4], PAIRS[-4], PAIRS[-1]], ids=lambda pair: kernel_name(*pair))
def test_too_little_shared_memory_does_not_compile(pair: tuple[GemmProblem, GemmConfig]) -> None:
    source, total = kernel_source(*pair), shared_memory(*pair).total
    assert f"SHARED_BYTES = {total};" in source.text
    text = source.text.replace(f"SHARED_BYTES = {total};", f"SHARED_BYTES = {total - 128};")
    with pytest.raises(CompileError, match="host computed less shared memory than the kernel uses") as error:
        compile_kernel(dataclasses.replace(source, text=text))
    assert f"stages={pair[1].stages}" in str(error.value)


def test_precompile_takes_problems() -> None:
    wanted = [problem("fp8 block"), problem("bf16", 7)]
    names = [one.name for one in jdg.precompile(wanted, progress=False)]
    assert names == [kernel_name(p, choose(p, H200)) for p in wanted]


def test_equal_sources_for_equally_aligned_shapes() -> None:
    c = GemmConfig(128, 128, 5, slabs=2)
    source = kernel_source(problem("fp8 block"), c)
    assert kernel_source(problem("fp8 block", 77, 136, 999), c).text == source.text
    assert len({kernel_source(problem("fp8 block", n=n), c).name for n in (4096, UNALIGNED, ODD)}) == 3


# --- what is legal ---------------------------------------------------------------------------------

BROKEN: list[tuple[GemmProblem, GemmConfig, str]] = [
    (problem("bf16"), GemmConfig(256, 128, 4, slabs=2), "64-row side is 256, must be 64, 128 or 192"),
    (
        problem("fp8 block"),
        GemmConfig(320, 64, 4, slabs=2),
        "64-row side is 320, must be 64, 128, 192 or 256",
    ),
    (problem("bf16"), GemmConfig(8, 192, 8, True), "side is 192, must be 64 or 128 with swap_ab or split_k"),
    (problem("fp8 block"), GemmConfig(256, 64, 4, split_k=2), "side is 256, must be 64 or 128 with swap_ab"),
    (problem("bf16"), GemmConfig(128, 12, 8), "other side is 12, must be 8 to 256 in steps of 8"),
    (problem("bf16"), GemmConfig(128, 100, 4, slabs=2), "other side is 100, must be 8 to 256 in steps of 8"),
    (problem("bf16"), GemmConfig(128, 128, 4, split_k=2, slabs=2), r"slabs is 2, must be one of \[0\]"),
    (problem("bf16"), GemmConfig(64, 160, 4, split_k=2), "160 columns leave no registers"),
    (problem("bf16"), GemmConfig(8, 64, 8, True, 1, 0), "blocks_per_sm is 0, must be 1, or 2 with swap_ab"),
    (problem("bf16"), GemmConfig(128, 128, 4, blocks_per_sm=2, slabs=2), "blocks_per_sm is 2, must be 1"),
    (problem("bf16"), GemmConfig(64, 128, 4, slabs=2, ping_pong=True), "ping_pong is for BF16 .* 128 rows"),
    (problem("fp8 block"), GemmConfig(128, 128, 4, slabs=2, ping_pong=True), "ping_pong is for BF16"),
    (problem("bf16"), GemmConfig(128, 256, 3, slabs=2, ping_pong=True), "256 columns leave no registers"),
    (problem("bf16"), GemmConfig(8, 64, 8, True, 3), "split_k is 3, must be 1, 2, 4 or 8"),
    (problem("fp8 block"), GemmConfig(128, 216, 4, slabs=6), "216 columns leave no registers"),
    (problem("fp8 block"), GemmConfig(256, 136, 4, slabs=4), "136 columns leave no registers"),
    (problem("bf16", n=ODD, add_c=True), GemmConfig(128, 184, 4), "184 columns leave no registers"),
    (problem("fp8 vector"), GemmConfig(128, 200, 4, slabs=6), "200 columns leave no registers"),
    (problem("fp8 block"), GemmConfig(128, 128, 9, True, 1, 2), "128 columns leave no registers"),
    (problem("fp8 block", k=512), GemmConfig(8, 64, 8, True, 2), "split_k is 2, more than the quads of k"),
    (problem("bf16"), GemmConfig(128, 256, 4, slabs=3), r"slabs is 3, must be one of \[8, 4, 2\]"),
    (problem("bf16", n=ODD), GemmConfig(128, 256, 4, slabs=4), r"slabs is 4, must be one of \[0\]"),
    (problem("bf16"), GemmConfig(128, 128, 1, slabs=2), "stages is 1, must be at least 2"),
    (problem("bf16"), GemmConfig(128, 128, 2, True), "partial tile does not fit over the ring"),
]


@pytest.mark.parametrize(("p", "c", "rule"), BROKEN, ids=[rule for *_, rule in BROKEN])
def test_each_rule_has_its_message(p: GemmProblem, c: GemmConfig, rule: str) -> None:
    [message] = problems_with(p, c)
    assert re.search(rule, message)
    side = Given(0, (4096, 4096))
    with pytest.raises(ValueError, match=rule) as error:
        FAMILY.plan(p, H200, {"a": side, "b": side}, c)
    assert str(c) in str(error.value)
    assert str(p) in str(error.value)
    assert "config=None" in str(error.value)


def test_all_broken_rules_are_named() -> None:
    assert len(problems_with(problem("bf16"), GemmConfig(256, 12, 1, split_k=3))) == 5


def test_more_shared_memory_than_a_block_has() -> None:
    a, b = shape(4096, 4096), shape(4096, 4096)
    too_deep = GemmConfig(128, 128, 9, slabs=2)
    with pytest.raises(ValueError, match="use fewer stages"):
        kernel.bf16_gemm.plan([a, b], [a], batch=None, chip=H200, layout="nt", config=too_deep)


# --- what is chosen, and how it is launched --------------------------------------------------------

TABLES = [
    *(of_case(case, True) for case in cases.dense_forward_fp8()),
    *(of_case(case, True) for case in cases.dense_dgrad_fp8()),
    *(of_case(case, True) for case in cases.dense_wgrad_fp8()),
    *(of_case(case, False) for case in cases.dense_forward_bf16()),
    *(of_case(case, False) for case in cases.dense_dgrad_bf16()),
    *(of_case(case, False) for case in cases.dense_wgrad_bf16()),
    *(of_case(case, True) for out in cases.OUT_DTYPES for case in cases.edges(out, True)),
    *(of_case(case, False) for out in cases.OUT_DTYPES for case in cases.edges(out, True)),
    *(of_case(case, True) for case in cases.edges(b_block=ROW)),
]


def shape(*dims: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def planned(p: GemmProblem, chip: Chip, shared_b: bool = False) -> Launch:
    """The one launch of a problem, from operands as the user has them, padded like those of a program."""
    types = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "bf16": jnp.bfloat16}
    batch = (p.batches,) if p.batches > 1 else ()
    batch_b = () if shared_b else batch
    out = shape(*batch, p.m, p.n, dtype=p.out)
    a = shape(*batch, *((p.m, p.k) if p.a_k_major else (p.k, p.m)), dtype=types[p.a])
    b = shape(*batch_b, *((p.n, p.k) if p.b_k_major else (p.k, p.n)), dtype=types[p.b])
    c = [out] if p.add_c else []
    if not p.is_fp8:
        operands = jax.eval_shape(functools.partial(padding.bf16_rows, layout=p.layout), a, b, *c)
        flags = batched(operands) if batch else None
        plan = kernel.bf16_gemm.plan(operands, [out], batch=flags, chip=chip, layout=p.layout)
        return the_launch(plan, p.add_c and p.out == "float32" and p.n % 2 == 0)
    blocks = ceil_div(p.k, 128)
    sa = shape(*batch, p.m, blocks, dtype=jnp.float32)
    sb = shape(*batch_b, p.n if p.b_scales == "vector" else ceil_div(p.n, 128), blocks, dtype=jnp.float32)
    operands = jax.eval_shape(padding.fp8_rows, a, sa, b, sb, *c)
    flags = batched(operands) if batch else None
    plan = kernel.fp8_gemm.plan(operands, [out], batch=flags, chip=chip)
    return the_launch(plan, p.add_c and p.out == "float32" and p.n % 2 == 0)


def the_launch(plan: LaunchPlan, in_place: bool) -> Launch:
    *copies, launch = plan.steps
    assert [type(step) for step in copies] == [Copy] * in_place
    assert isinstance(launch, Launch)
    return launch


def batched(operands: Iterable[Any]) -> tuple[bool, ...]:
    return tuple(one.ndim == 3 for one in operands)


def kind_of(param: Any) -> str:
    if isinstance(param, TensorMap):
        return "map"
    return "pointer" if isinstance(param, (Operand, Result)) else "int"


def kinds_in(source: KernelSource) -> list[str]:
    """The kernel's parameters, as its text declares them."""
    [declared] = re.findall(rf"{source.name}\((.*?)\) \{{", source.text)
    return [
        "map" if "TensorMap" in one else "pointer" if "*" in one else "int" for one in declared.split(", ")
    ]


def check_choice(p: GemmProblem, chip: Chip) -> GemmConfig:
    c = choose(p, chip)
    assert problems_with(p, c) == []
    total = shared_memory(p, c).total
    assert total <= chip.smem_per_block
    assert c.blocks_per_sm * (total + 1024) <= chip.smem_per_block + 1024
    assert c.stages >= 3
    if c.shares_registers:
        assert 128 * (c.warpgroups * c.registers + c.producer_registers) <= 65_536
    return c


def check_launch(p: GemmProblem, c: GemmConfig, chip: Chip, launch: Launch) -> None:
    tiles = ceil_div(p.m, c.block_m) * ceil_div(p.n, c.block_n) * p.batches
    assert launch.grid == ((tiles * c.split_k if c.one_tile else min(tiles, chip.num_sms)), 1, 1)
    assert launch.cluster == c.split_k
    assert launch.block == c.threads
    assert launch.shared_memory == shared_memory(p, c).total
    assert [kind_of(param) for param in launch.params] == kinds_in(kernel_source(p, c))
    maps = [param for param in launch.params if isinstance(param, TensorMap)]
    assert all(stride % 16 == 0 for one in maps for stride in one.strides)
    assert all(one.dims[2] in (1, p.batches) for one in maps)
    a, b = maps[:2]
    for one, tile, k_major in ((a, c.block_m, p.a_k_major), (b, c.block_n, p.b_k_major)):
        assert one.swizzle == 128
        assert one.box == ((p.block_k, tile, 1) if k_major else (64, 64, 1))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "compile_kernel", lambda source, arch: FakeKernel(source.name, arch=arch))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("num_sms", [132, 20, 1])
def test_tables_have_legal_launches(num_sms: int) -> None:
    chip = dataclasses.replace(H200, num_sms=num_sms)
    for p in TABLES:
        launch = planned(p, chip)
        padded = as_planned(p)
        check_launch(padded, check_choice(padded, chip), chip, launch)


def as_planned(p: GemmProblem) -> GemmProblem:
    """The problem that the kernel is chosen for: k as padded, and one row of scales is a block."""
    pads_k = p.is_fp8 or p.a_k_major or p.b_k_major
    k = ceil_div(p.k, 16 if p.is_fp8 else 8) * (16 if p.is_fp8 else 8) if pads_k else p.k
    scales = "block" if p.is_fp8 and p.n == 1 else p.b_scales
    return dataclasses.replace(p, k=k, b_scales=scales)


SIZES = st.one_of(
    st.integers(1, 300),
    st.integers(1, 20_000),
    st.builds(lambda tiles, tail: max(1, 64 * tiles + tail), st.integers(1, 2000), st.integers(-1, 1)),
)


@st.composite
def problems(draw: st.DrawFn) -> GemmProblem:
    kind = draw(st.sampled_from(list(KINDS)))
    types: dict[str, Any] = {name: draw(st.sampled_from(["e4m3", "e5m2"])) for name in "ab"}
    if kind == "bf16":
        types = {"layout": draw(st.sampled_from(cases.LAYOUTS))}
    return problem(
        kind,
        *(draw(SIZES) for _ in range(3)),
        out=draw(st.sampled_from(cases.OUT_DTYPES)),
        add_c=draw(st.booleans()),
        batches=draw(st.sampled_from([1, 1, 2, 7])),
        **types,
    )


@given(p=problems(), num_sms=st.integers(1, 132), shared_b=st.booleans())
def test_any_problem_has_a_legal_launch(p: GemmProblem, num_sms: int, shared_b: bool) -> None:
    chip = dataclasses.replace(H200, num_sms=num_sms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "compile_kernel", lambda source, arch: FakeKernel(source.name, arch=arch))
        launch = planned(p, chip, shared_b)
    padded = as_planned(p)
    a, b, c = (True,), (not shared_b,), (True,) * p.add_c
    flags = ((*a * 2, *b * 2, *c) if p.is_fp8 else (*a, *b, *c)) if p.batches > 1 else ()
    check_launch(padded, check_choice(dataclasses.replace(padded, batched=flags), chip), chip, launch)


@given(p=problems(), num_sms=st.integers(1, 132))
def test_every_candidate_is_legal(p: GemmProblem, num_sms: int) -> None:
    chip = dataclasses.replace(H200, num_sms=num_sms)
    found = list(candidates(p, chip))
    assert len({kernel_name(p, c) for c in found}) == len(found)
    for c in found:
        assert problems_with(p, c) == []
        assert shared_memory(p, c).total <= chip.smem_per_block
        assert cost(p, c, chip).total > 0


@pytest.mark.parametrize(
    ("m", "n", "k", "once"),
    [
        (1, 4096, 2048, True),
        (256, 4096, 2048, True),
        (257, 4096, 2048, False),
        (1, 4096, 512, False),
        (1, 65536, 4096, False),
    ],
)
def test_weights_that_meet_few_rows_need_not_stay_in_l2(m: int, n: int, k: int, once: bool) -> None:
    p = problem("bf16", m, n, k)
    assert p.b_once == once
    assert ("once" in kernel_name(p, choose(p, H200)).split("_")) == once


def test_weights_that_a_batch_shares_stay_in_l2() -> None:
    batch = problem("bf16", 1, batches=3)
    assert dataclasses.replace(batch, batched=(True, True)).b_once
    assert not dataclasses.replace(batch, batched=(True, False)).b_once


def test_persistent_grid_is_one_block_per_sm_at_most() -> None:
    p, c = problem("bf16"), GemmConfig(128, 256, 3, slabs=4)
    side = shape(4096, 4096)
    grids = [
        kernel.bf16_gemm.plan(
            [side, side], [side], batch=None, chip=H200, layout="nt", config=c, num_sms=limit
        )
        .steps[0]
        .grid[0]
        for limit in (None, 7, 1000)
    ]
    assert grids == [132, 7, 132]
    assert problems_with(p, c) == []


@pytest.mark.parametrize(
    ("m", "k", "height"), [(8192, 7168, 16), (8192, 3072, 21), (8192, 512, 32), (1000, 512, 8), (8192, 0, 32)]
)
def test_rows_that_stay_in_l2_are_walked_together(m: int, k: int, height: int) -> None:
    tile = GemmConfig(128, 256, 4)
    assert plans.stripe_height(problem("fp8 block", m, k=k), tile, H200) == height
    assert plans.stripe_height(problem("bf16", m, k=k // 2), tile, H200) == height


# --- the cost model --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("n", "k"), cases.DENSE_NK)
def test_twice_the_rows_are_not_cheaper(n: int, k: int, kind: str) -> None:
    sizes = [problem(kind, 1 << i, n, k) for i in range(15)]
    times = [cost(p, choose(p, H200), H200).total for p in sizes]
    assert all(more >= 0.999 * fewer for fewer, more in itertools.pairwise(times)), times


def test_fewer_sms_are_not_faster() -> None:
    for p in TABLES[:40]:
        few = dataclasses.replace(H200, num_sms=33)
        assert cost(p, choose(p, few), few).total >= 0.999 * cost(p, choose(p, H200), H200).total


def test_cost_says_its_terms() -> None:
    p = problem("fp8 block")
    text = str(cost(p, choose(p, H200), H200))
    assert re.fullmatch(r"[\d.]+ us \(start [\d.]+, compute [\d.]+, memory [\d.]+, waves \d+\)", text)
    assert str(p) == "e4m3xe4m3 nt m=4096 n=4096 k=4096 -> bfloat16 B scales 128x128"


def test_print_configs_says_each_lowering_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jax_deepgemm._ffi")
    monkeypatch.setenv("JAX_DEEPGEMM_PRINT_CONFIGS", "1")
    for rows in (96, 104):
        p = problem("bf16", rows, 264, 520)
        c = choose(p, H200)
        traced = jax.jit(jdg.bf16_gemm_nt).trace(shape(rows, 520), shape(264, 520))
        traced.lower(lowering_platforms=("cuda",))
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jax_deepgemm:")]
        assert said == [f"jax_deepgemm: {p}: {c}, {cost(p, c, H200)}"]
