// Named barriers that some threads only arrive at (PTX ISA 9.7.13.1).
#pragma once

#include <jax_deepgemm/ptx/barrier.cuh>

namespace jdg::ptx {

// Counts like named_barrier, without waiting.
template <int ID, int THREADS>
__device__ __forceinline__ void named_barrier_arrive() {
  asm volatile("bar.arrive %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

}  // namespace jdg::ptx
