"""`explain`: what a traced function will launch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jax_deepgemm as jdg
from jax_deepgemm.core.chip import H200, Chip
from jax_deepgemm.tools.explain import kernel_names

pytest.importorskip("cuda.core")


def shape(*dims: int, dtype: jnp.dtype = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def test_linear_forward_and_backward_are_three_calls(capsys: pytest.CaptureFixture[str]) -> None:
    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jdg.fp8_linear(x, w).astype(jnp.float32).sum()

    calls = jdg.explain(jax.jit(jax.grad(loss, argnums=(0, 1))), shape(256, 512), shape(384, 512))
    gemms = [call for call in calls if call.config is not None]
    assert len(gemms) == 3
    assert {call.op for call in calls} - {call.op for call in gemms} == {
        "quantize_both_float8_e4m3fn_f32",
        "quantize_weight_float8_e4m3fn_f32",
    }
    assert {call.problem.split(" ->")[0].split(" nt ")[1] for call in gemms} == {
        "m=256 n=384 k=512",
        "m=256 n=512 k=384",
        "m=384 n=512 k=256",
    }
    printed = capsys.readouterr().out
    assert all(str(call) in printed for call in calls)


def test_calls_inside_loops_and_checkpoints_are_found() -> None:
    @jax.checkpoint
    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        return jdg.bf16_gemm_nt(x, w)

    def stack(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, w: (layer(h, w), None), x, weights)[0]

    [call] = jdg.explain(stack, shape(128, 256), shape(3, 256, 256), show=False)
    assert call.op == "bf16_gemm_nt"
    assert "m=128 n=256 k=256" in call.problem


def test_facts_of_a_kernel() -> None:
    [call] = jdg.explain(jdg.bf16_gemm_nt, shape(256, 512), shape(384, 512), show=False)
    [kernel] = call.kernels
    assert kernel.name.startswith("jdg_")
    assert 0 < kernel.registers <= 255
    assert kernel.spill_bytes == kernel.local_bytes == 0
    assert len(kernel.digest) == 64
    assert kernel.shared_memory <= H200.smem_per_block
    assert call.candidates[0][0] == call.config
    assert kernel_names(jdg.bf16_gemm_nt, shape(256, 512), shape(384, 512)) == [kernel.name]


def test_vmap_shows_its_batch() -> None:
    [call] = jdg.explain(
        jax.vmap(jdg.bf16_gemm_nt, in_axes=(0, None)), shape(5, 64, 256), shape(128, 256), show=False
    )
    assert "batches=5" in call.problem


def test_chip_and_num_sms_bound_the_grid() -> None:
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jdg.bf16_gemm_nt(a, b, num_sms=16)

    large = shape(4096, 512), shape(4096, 512)
    [few] = jdg.explain(product, *large, show=False)
    [small_chip] = jdg.explain(jdg.bf16_gemm_nt, *large, chip=Chip(num_sms=20), show=False)
    assert few.kernels[0].grid[0] == 16
    assert small_chip.kernels[0].grid[0] == 20


def test_function_without_ops(capsys: pytest.CaptureFixture[str]) -> None:
    assert jdg.explain(jnp.sin, shape(4)) == []
    assert "No op of jax_deepgemm" in capsys.readouterr().out


def test_grouped_and_quantising_ops_are_explained() -> None:
    sizes = jax.ShapeDtypeStruct((6,), jnp.int32)
    [call] = jdg.explain(jdg.ragged_dot, shape(256, 512), shape(6, 512, 384), sizes, show=False)
    assert call.problem.startswith("m_grouped bf16xbf16 nn groups=6 m=256 n=384 k=512")
    assert call.config == call.candidates[0][0]
    [made] = jdg.explain(jdg.quantize, shape(256, 512), show=False)
    assert made.config is None
    assert made.candidates == ()
    assert made.problem in str(made)


def test_flops_are_those_of_the_whole_product() -> None:
    """XLA's cost_analysis has no number for a custom call."""
    x, experts, sizes = shape(24, 32), shape(3, 16, 32), shape(3, dtype=jnp.int32)
    once = 2 * 24 * 16 * 32
    products = (
        (jax.vmap(jdg.bf16_gemm_nt, (0, None)), (shape(3, 8, 32), shape(16, 32)), once),
        (jdg.m_grouped_bf16_gemm_nt_contiguous, (x, experts, sizes), once),
        (jdg.m_grouped_bf16_gemm_nt_masked, (shape(3, 24, 32), experts, sizes), 3 * once),
        (jdg.k_grouped_bf16_gemm_tn_contiguous, (shape(24, 16), x, sizes), once),
        (jdg.quantize, (x,), 0),
    )
    for function, types, flops in products:
        assert [call.flops for call in jdg.explain(function, *types, show=False)] == [flops]
