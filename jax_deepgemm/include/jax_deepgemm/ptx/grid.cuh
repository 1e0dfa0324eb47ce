// Memory of a block, and what the blocks of a launch tell each other through global memory (PTX ISA 8).
#pragma once

#include <jax_deepgemm/ptx/types.cuh>

namespace jdg::ptx {

// The dynamic shared memory of this block.
__device__ __forceinline__ int* shared_words() {
  extern __shared__ int words[];
  return words;
}

// Passes the L1 cache by, which other blocks' stores do not reach.
__device__ __forceinline__ int load_shared_by_blocks(const int* at) {
  int v;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared_by_blocks(int* at, int v) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}

// Returns once all threads of all blocks have come here, and what they wrote before is visible. *arrived was
// zero when the kernel began, and this is the only meeting. All blocks must run at once (a cooperative
// launch), else they wait for ever.
__device__ __forceinline__ void meet_all_blocks(u32* arrived) {
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
    u32 count;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(arrived) : "memory");
    } while (count < gridDim.x);
  }
  __syncthreads();
}

}  // namespace jdg::ptx
