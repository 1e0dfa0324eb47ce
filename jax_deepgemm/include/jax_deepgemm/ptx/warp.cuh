// What the lanes of a warp do together, beside CUDA's own shuffles and votes.
#pragma once

#include <jax_deepgemm/ptx/types.cuh>

namespace jdg::ptx {

// The largest of the lanes' values, to all of them; every lane takes part (PTX ISA 9.7.13, redux.sync).
__device__ __forceinline__ u32 reduce_max(u32 v) {
  u32 most;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(most) : "r"(v));
  return most;
}

}  // namespace jdg::ptx
