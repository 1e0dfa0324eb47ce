"""Knobs, per call and as settings: which configurations are chosen, which launches overlap."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jax_deepgemm as jdg
from jax_deepgemm import config, deep_gemm
from jax_deepgemm.core import kernel_rule, tuning
from jax_deepgemm.core.chip import H200, with_knobs
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.launch import Launch, LaunchPlan, Memset, Operand, Result
from jax_deepgemm.jit import CompiledKernel
from jax_deepgemm.ops.gemm.family import FAMILY, GemmProblem
from jax_deepgemm.tools.explain import problems

pytestmark = pytest.mark.any_version

A, B = (jax.ShapeDtypeStruct((rows, 7168), jnp.bfloat16) for rows in (4096, 2112))


def chosen(function: Any, *operands: Any) -> Any:
    """The configuration of the one call that a function makes, and the SMs of the chip."""
    [(problem, chip)] = problems(function, *operands)
    return FAMILY.choose(problem, chip).config, chip.num_sms


def test_tiles_are_multiples_per_call_and_in_a_block() -> None:
    free, _ = chosen(lambda a, b: deep_gemm.bf16_gemm_nt(a, b), A, B)
    assert free.block_n % 128
    per_call, _ = chosen(lambda a, b: deep_gemm.bf16_gemm_nt(a, b, block_size_multiple_of=128), A, B)
    assert per_call.block_n % 128 == 0
    with config.use(block_size_multiple_of=128):
        assert chosen(lambda a, b: jdg.bf16_gemm_nt(a, b), A, B) == (per_call, 132)
    deep_gemm.set_block_size_multiple_of((16, 128))
    try:
        assert chosen(lambda a, b: jdg.bf16_gemm_nt(a, b), A, B) == (per_call, 132)
    finally:
        deep_gemm.set_block_size_multiple_of(1)


def test_products_of_gradients_keep_the_setting_too() -> None:
    def loss(a: jax.Array, b: jax.Array) -> jax.Array:
        return jdg.bf16_gemm_nt(a, b).astype(jnp.float32).sum()

    with config.use(block_size_multiple_of=96):
        found = problems(jax.grad(loss, (0, 1)), A, B)
    assert len(found) == 3
    assert [chip.block_n_of for _, chip in found] == [96] * 3


def test_explain_shows_and_ranks_those_only() -> None:
    small = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    with config.use(block_size_multiple_of=64):
        [call] = jdg.explain(lambda a: jdg.bf16_gemm_nt(a, a), small, show=False)
    assert {cut.block_n % 64 for cut, _ in call.candidates} == {0}
    assert call.config == call.candidates[0][0]


def test_a_multiple_that_no_tile_has_is_an_error() -> None:
    problem = GemmProblem(4096, 2112, 7168)
    with pytest.raises(
        ValueError, match=r"no configuration has a block_n that is a multiple of 250.*Use a smaller"
    ):
        FAMILY.choose(problem, with_knobs(H200, (("block_size_multiple_of", 250),)))
    assert (
        FAMILY.choose(problem, with_knobs(H200, (("block_size_multiple_of", 64),))).config.block_n % 64 == 0
    )


def test_a_measured_configuration_of_another_width_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = GemmProblem(4096, 2112, 7168)
    best = FAMILY.cheapest(problem, H200)
    monkeypatch.setattr(tuning, "lookup", lambda *_: tuning.Entry(best, 1.0, best, 1.0, 2))
    assert FAMILY.choose(problem, H200).origin.startswith("measured")
    assert best.block_n % 32
    assert FAMILY.choose(problem, with_knobs(H200, (("block_size_multiple_of", 32),))).origin == "cost model"


def test_programs_without_knobs_are_as_they_were() -> None:
    small = jnp.ones((16, 16), jnp.bfloat16)
    plain = str(jax.make_jaxpr(jdg.bf16_gemm_nt)(small, small))
    assert "knobs" not in plain
    with config.use(tc_util=50, ignore_compile_dims=True, mk_alignment=64):
        assert str(jax.make_jaxpr(lambda a, b: jdg.bf16_gemm_nt(a, b))(small, small)) == plain
    with config.use(pdl=False):
        assert "knobs" in str(jax.make_jaxpr(lambda a, b: jdg.bf16_gemm_nt(a, b))(small, small))


def test_sms() -> None:
    assert chosen(lambda a, b: deep_gemm.bf16_gemm_nt(a, b, num_sms=101), A, B)[1] == 101
    assert deep_gemm.get_num_sms() == 132
    deep_gemm.set_num_sms(99)
    try:
        assert deep_gemm.get_num_sms() == 99
        assert chosen(lambda a, b: jdg.bf16_gemm_nt(a, b), A, B)[1] == 99
    finally:
        deep_gemm.set_num_sms(0)
    assert config.get().num_sms is None


LAUNCH = Launch(
    CompiledKernel("work", b"", "0" * 64, "90a"), (1, 1, 1), 128, (Operand(0), Result(0)), pdl=True
)
PLAN = LaunchPlan((LAUNCH, Memset(Result(0), 4), LAUNCH), label="two")


class Emitted(Exception):
    """What would be put into a program."""


@pytest.mark.parametrize("overlap", [True, False])
def test_launches_overlap_or_not(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def emit(ctx: Any, plan: LaunchPlan, *_: Any, **__: Any) -> None:
        raise Emitted([getattr(step, "pdl", None) for step in plan.steps], plan.label)

    monkeypatch.setattr(LazyKernel, "plan", lambda *_, **__: PLAN)
    monkeypatch.setattr(kernel_rule.launch, "emit", emit)
    with config.use(pdl=overlap):
        traced = jax.jit(lambda a, b: jdg.bf16_gemm_nt(a, b)).trace(A, B)
    with pytest.raises(Emitted) as found:
        traced.lower(lowering_platforms=("cuda",))
    assert found.value.args == ([overlap, None, overlap], "two")


@pytest.mark.parametrize(
    ("set_it", "value", "message"),
    [
        (deep_gemm.set_num_sms, -1, "num_sms is -1, need a positive int, or None"),
        (deep_gemm.set_num_sms, False, "num_sms is False"),
        (deep_gemm.set_tc_util, 101, "tc_util is 101, need an int from 0 to 100"),
        (deep_gemm.set_pdl, 1, "pdl is 1, need True or False"),
        (deep_gemm.set_ignore_compile_dims, None, "ignore_compile_dims is None, need True or False"),
        (
            deep_gemm.set_block_size_multiple_of,
            (1, 512),
            "block_size_multiple_of is 512, need an int from 1 to 256",
        ),
        (deep_gemm.set_block_size_multiple_of, (1, 2, 3), r"block_size_multiple_of is \(1, 2, 3\)"),
        (deep_gemm.set_mk_alignment_for_contiguous_layout, 0, "alignment is 0, need a positive int"),
    ],
)
def test_values_are_checked(set_it: Any, value: Any, message: str) -> None:
    before = config.get()
    with pytest.raises(ValueError, match=message):
        set_it(value)
    assert config.get() == before


def test_what_changes_nothing_is_kept() -> None:
    before = config.get()
    try:
        for put, got, value in (
            (deep_gemm.set_tc_util, deep_gemm.get_tc_util, 70),
            (deep_gemm.set_pdl, deep_gemm.get_pdl, False),
            (deep_gemm.set_ignore_compile_dims, lambda: config.get().ignore_compile_dims, True),
        ):
            put(value)
            assert got() == value
    finally:
        config.update(tc_util=before.tc_util, pdl=before.pdl, ignore_compile_dims=before.ignore_compile_dims)
    deep_gemm.use_deterministic_algorithms(True)
    deep_gemm.shutdown()
    assert config.get() == before
