"""Kernels to compile, and a fresh start for the compiler's cache."""

from __future__ import annotations

import os
import subprocess
import sys

from jax_deepgemm.jit import KernelSource, cache, compiler

# wgmma and setmaxnreg exist for sm_90a only: that this compiles proves the target.
HOPPER = r"""
extern "C" __global__ void __launch_bounds__(128, 1) hopper(float* out, long a, long b) {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
  float d[4] = {0, 0, 0, 0};
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, %4, %5, 1, 1, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
}
"""
LOCAL_MEMORY = r"""
extern "C" __global__ void local(float* out, const int* index) {
  float table[64];
  for (int i = 0; i < 64; ++i) table[i] = out[i];
  for (int i = 0; i < index[0]; ++i) table[index[i] & 63] += 1;
  out[threadIdx.x] = table[index[1] & 63];
}
"""
IGNORED_SETMAXNREG = (
    'extern "C" __global__ void f() { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }'
)


def fill(value: int = 1) -> KernelSource:
    text = f'extern "C" __global__ void fill(float* x) {{ x[threadIdx.x] = {value}; }}'
    return KernelSource("fill", text, (("value", value),))


def forget() -> None:
    """What a new process would not know."""
    compiler._memory.clear()
    cache._open.cache_clear()


def python(script: str, **env: str) -> subprocess.Popen[str]:
    env = {**os.environ, **env}
    return subprocess.Popen([sys.executable, "-c", script], env=env, text=True, stdout=subprocess.PIPE)
