"""Wrappers of instructions: wgmma, whose text is generated, and tensor copies of every rank."""

from __future__ import annotations

import re

import pytest

from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.jit.wgmma import wgmma_wrapper
from tests.shared.sass import disassemble

pytestmark = pytest.mark.any_version

# --- wgmma -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "a", "b", "k"), [(8, "e4m3", "e5m2", 32), (256, "bf16", "bf16", 16)])
def test_wgmma_numbers_its_operands(n: int, a: str, b: str, k: int) -> None:
    text = wgmma_wrapper(n, a, b)
    count = n // 2
    assert f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{a}.{b} " in text
    [registers] = re.findall(r'"\{(%[^}]*)\}, ', text)
    assert registers.split(", ") == [f"%{i}" for i in range(count)]
    assert f"}}, %{count}, %{count + 1}, p, 1, 1" in text  # both descriptors, then scale-d and the signs
    assert f"setp.ne.b32 p, %{count + 2}, 0;" in text
    assert re.findall(r'"\+f"\(d\[(\d+)\]\)', text) == [str(i) for i in range(count)]
    assert f"float (&d)[{count}]" in text


@pytest.mark.parametrize("a_k_major", [True, False])
@pytest.mark.parametrize("b_k_major", [True, False])
def test_wgmma_transposes_bf16_only(a_k_major: bool, b_k_major: bool) -> None:
    text = wgmma_wrapper(64, "bf16", "bf16", a_k_major=a_k_major, b_k_major=b_k_major)
    assert f"p, 1, 1, {int(not a_k_major)}, {int(not b_k_major)};" in text
    assert "p, 1, 1;" in wgmma_wrapper(64, "e5m2", "e4m3")


# One product of 64 x 16, whose first operand is a descriptor or this thread's fragment.
PRODUCT = """\
#include <jax_deepgemm/ptx/wgmma.cuh>
{wrapper}
extern "C" __global__ void {name}(const jdg::u32* from, jdg::u64 a, jdg::u64 b, float* out) {{
  jdg::u32 fragment[4];
  for (int i = 0; i < 4; ++i) fragment[i] = from[threadIdx.x * 4 + i];
  float d[8] = {{}};
  jdg::ptx::pin(d);
  jdg::ptx::wgmma_fence();
  Mma::issue(d, {first}, b, from[0] != 0);
  jdg::ptx::wgmma_commit();
  jdg::ptx::wgmma_wait<0>();
  jdg::ptx::pin(d);
  for (int i = 0; i < 8; ++i) out[threadIdx.x * 8 + i] = d[i];
}}
"""


@pytest.mark.parametrize("a_in_registers", [False, True])
@pytest.mark.parametrize(
    ("a", "b", "b_k_major", "instruction"),
    [
        ("bf16", "bf16", True, "HGMMA.64x16x16.F32.BF16"),
        ("bf16", "bf16", False, "HGMMA.64x16x16.F32.BF16"),
        ("f16", "f16", False, "HGMMA.64x16x16.F32"),
        ("tf32", "tf32", True, "HGMMA.64x16x8.F32.TF32"),
        ("e4m3", "e5m2", True, "QGMMA.64x16x32.F32.E4M3.E5M2"),
    ],
)
def test_wgmma_compiles_to_its_instruction(
    a: str, b: str, b_k_major: bool, instruction: str, a_in_registers: bool
) -> None:
    pytest.importorskip("cuda.core")
    name = f"product_{a}_{b}_{'kn'[b_k_major]}_{'sr'[a_in_registers]}"
    wrapper = wgmma_wrapper(16, a, b, b_k_major=b_k_major, a_in_registers=a_in_registers)
    text = PRODUCT.format(wrapper=wrapper, name=name, first="fragment" if a_in_registers else "a")
    kernel = compile_kernel(KernelSource(name, text))
    assert kernel.report.problems() == ()
    [found] = re.findall(r"\b\wGMMA\..*", disassemble(kernel))
    assert found.startswith(instruction + " ")
    accumulator, first = (operand.strip() for operand in found.removeprefix(instruction).split(",")[:2])
    assert accumulator.startswith("R")
    assert first.startswith("R" if a_in_registers else "gdesc")
    assert ("tnspB" in found) == (not b_k_major)


@pytest.mark.parametrize(
    ("n", "a", "b", "options", "rule"),
    [
        (12, "bf16", "bf16", {}, "n is 12, must be 8 to 256 in steps of 8"),
        (264, "bf16", "bf16", {}, "n is 264, must be 8 to 256 in steps of 8"),
        (64, "fp16", "fp16", {}, "'fp16' and 'fp16', must be equal, one of e4m3, e5m2, bf16, tf32"),
        (64, "bf16", "e4m3", {}, "'bf16' and 'e4m3', must be equal"),
        (64, "tf32", "tf32", {"b_k_major": False}, "tf32 operands must both be K-major"),
        (64, "e4m3", "e4m3", {"a_k_major": False}, "e4m3 operands must both be K-major"),
        (64, "bf16", "bf16", {"a_k_major": False, "a_in_registers": True}, "A in registers is K-major"),
    ],
)
def test_wgmma_refuses_what_does_not_exist(
    n: int, a: str, b: str, options: dict[str, bool], rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        wgmma_wrapper(n, a, b, **options)


# --- tensor copies ---------------------------------------------------------------------------------


def test_tensor_loads_of_every_rank() -> None:
    pytest.importorskip("cuda.core")
    loads = "\n".join(
        f"  jdg::ptx::tma_load(smem + {rank} * 128, map, bar, {', '.join('xyzwv'[:rank])});"
        for rank in range(1, 6)
    )
    text = f"""\
#include <jax_deepgemm/ptx/barrier.cuh>
#include <jax_deepgemm/ptx/tma.cuh>
extern "C" __global__ void loads(const __grid_constant__ jdg::TensorMap map, jdg::u32 smem, jdg::u32 bar,
                                 int x, int y, int z, int w, int v) {{
  if (!jdg::ptx::elect()) return;
{loads}
}}
"""
    kernel = compile_kernel(KernelSource("loads", text))
    assert re.findall(r"UTMALDG\.(\d)D", disassemble(kernel)) == list("12345")
