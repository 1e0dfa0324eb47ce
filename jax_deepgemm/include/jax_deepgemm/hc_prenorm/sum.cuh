// The sums over splits of what hc_prenorm.cuh gives for each, always in the same order. It may start while
// that kernel still runs (programmatic dependent launch), and waits for its end.
//
//   a block     OUTPUTS sums, by OUTPUTS * PARTS threads: thread (part, i) adds splits part, part + PARTS, ..
//               of sum i; thread (0, i) adds those of the parts, in their order
//
// Sums are counted through: those of d, then those of squares.
#pragma once

#include <jax_deepgemm/ptx/barrier.cuh>
#include <jax_deepgemm/ptx/memory.cuh>

namespace jdg {

template <int OUTPUTS, int PARTS>
__device__ __forceinline__ void sum_splits(const float* ds, const float* all_squares, float* d,
                                           float* squares, i64 mn, int m, int splits) {
  extern __shared__ __align__(1024) char shared[];  // [part][sum], float32
  const u32 mine = smem_address(shared) + threadIdx.x * 4;
  const int i = threadIdx.x % OUTPUTS, part = threadIdx.x / OUTPUTS;
  const i64 at = static_cast<i64>(blockIdx.x) * OUTPUTS + i;
  const bool of_d = at < mn, exists = at < mn + m;
  const i64 own = of_d ? at : at - mn, step = of_d ? mn : m;
  const float* from = (of_d ? ds : all_squares) + own;

  ptx::wait_for_previous_kernel();
  float sum = 0.0f;
  if (exists) {
#pragma unroll 8
    for (int split = part; split < splits; split += PARTS) sum += from[split * step];
  }
  ptx::store_shared(mine, sum);
  __syncthreads();
  if (part > 0 || !exists) return;
#pragma unroll
  for (int other = 1; other < PARTS; ++other) sum += ptx::load_shared(mine + other * OUTPUTS * 4);
  (of_d ? d : squares)[own] = sum;
}

}  // namespace jdg
