"""The pipeline of shared-memory slots (include/jax_deepgemm/pipeline.cuh), without a GPU.

The device code itself runs on the CPU, one thread for each warp (tests/shared/native/pipeline.cc), with the
thread sanitizer on, which finds a slot that is written while it is read. A small kernel shows that no GEMM is
needed to use it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import jax_deepgemm
from jax_deepgemm.jit import KernelSource, compile_kernel

pytestmark = pytest.mark.any_version

NATIVE = Path(__file__).parents[1] / "shared" / "native"
DEVICE_CODE = Path(jax_deepgemm.__file__).parent / "include"
PIPELINE = DEVICE_CODE / "jax_deepgemm" / "pipeline.cuh"

BROKEN = {
    "consumers do not wait": ("mbarrier_wait(full(ahead), phase)", "mbarrier_wait(full(ahead), phase ^ 1)"),
    "phases do not alternate": ("      phase ^= 1;\n", ""),
    "turns begin at the first slot": ("__int_as_float(pipeline.stage)", "0.0f"),
}


def run(folder: Path, *included: Path, limit_s: int = 120) -> subprocess.CompletedProcess[str]:
    """Of pipeline.cc, compiled with headers from `included` first."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = folder / "pipeline"
    include = [f"-I{path}" for path in (*included, NATIVE / "warps", DEVICE_CODE)]
    flags = ["-std=c++20", "-Og", "-pthread", "-fsanitize=thread"]
    subprocess.run([compiler, *flags, *include, NATIVE / "pipeline.cc", "-o", target], check=True)
    return subprocess.run([target], capture_output=True, text=True, check=False, timeout=limit_s)


def test_blocks_arrive_in_order(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "every block in order\n"


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_pipeline_is_found(what: str, tmp_path: Path) -> None:
    right, wrong = BROKEN[what]
    text = PIPELINE.read_text()
    assert text.count(right) == 1
    changed = tmp_path / "jax_deepgemm" / "pipeline.cuh"
    changed.parent.mkdir()
    changed.write_text(text.replace(right, wrong))
    assert fails(changed.parents[1])


def fails(folder: Path) -> bool:
    try:
        return run(folder, folder, limit_s=10).returncode != 0
    except subprocess.TimeoutExpired:
        return True  # a deadlock


def test_pipeline_knows_no_family() -> None:
    """It includes what all kernels share, and nothing else."""
    pending, seen = [PIPELINE], set()
    while pending:
        path = pending.pop()
        seen.add(path.relative_to(DEVICE_CODE / "jax_deepgemm").parts[0])
        pending += [DEVICE_CODE / name for name in re.findall(r"#include <(\S+)>", path.read_text())]
    assert seen == {"pipeline.cuh", "ptx"}


ROW_SUMS = """\
#include <jax_deepgemm/pipeline.cuh>
#include <jax_deepgemm/ptx/tma.cuh>

constexpr int kStages = 4, kRowBytes = 1024;
using Rows = jdg::Pipeline<kStages, kStages * kRowBytes>;

// out[row] = sum of 256 floats: a producer thread, and a consumer warp.
extern "C" __global__ void row_sums(const __grid_constant__ jdg::TensorMap map, float* out, int rows) {
  extern __shared__ __align__(1024) char shared[];
  Rows pipe(jdg::smem_address(shared));
  if (threadIdx.x == 0) {
    pipe.init(1);
    jdg::ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (jdg::warp_index() == 1) {
    if (!jdg::ptx::elect()) return;
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
      pipe.wait_empty();
      pipe.expect(kRowBytes);
      jdg::ptx::tma_load(pipe.smem + pipe.stage * kRowBytes, map, pipe.full(), 0, row);
      pipe.advance();
    }
    return;
  }
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    pipe.wait_full();
    float sum = 0.0f;
    for (int i = threadIdx.x; i < kRowBytes / 4; i += 32)
      sum += jdg::ptx::load_shared(pipe.smem + pipe.stage * kRowBytes + i * 4);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, step);
    if (threadIdx.x == 0) {
      out[row] = sum;
      pipe.release(pipe.empty());
    }
    pipe.advance();
  }
}
"""


def test_a_kernel_without_a_gemm() -> None:
    pytest.importorskip("cuda.core")
    kernel = compile_kernel(KernelSource("row_sums", ROW_SUMS))
    assert kernel.report.problems() == ()
