// ptx/grid.cuh for CPU threads: relaxed loads and stores, and a counter that blocks wait for.
#pragma once

#include <jax_deepgemm/ptx/barrier.cuh>

namespace jdg::ptx {

inline int* shared_words() { return block->shared.data(); }
inline int load_shared_by_blocks(const int* at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }
inline void store_shared_by_blocks(int* at, int v) { __atomic_store_n(at, v, __ATOMIC_RELAXED); }

inline void meet_all_blocks(u32* arrived) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __atomic_fetch_add(arrived, 1, __ATOMIC_RELEASE);
    while (__atomic_load_n(arrived, __ATOMIC_ACQUIRE) < gridDim.x) std::this_thread::yield();
  }
  __syncthreads();
}

}  // namespace jdg::ptx
