// Copies from global to shared memory that a thread makes by itself and need not wait for (PTX
// ISA 9.7.9.25.3).
#pragma once

#include <jax_deepgemm/ptx/types.cuh>

namespace jdg::ptx {

// 16 bytes into shared memory, the first `bytes` of them from global memory, the others zero.
__device__ __forceinline__ void copy_async(u32 shared, const void* global, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until this thread's copies have landed; it may then read them, other threads after a barrier.
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// The same of all but the last `PENDING` groups of copies.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four bytes, by this thread.
__device__ __forceinline__ void copy_async_4(u32 smem, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem), "l"(__cvta_generic_to_global(from))
               : "memory");
}

// Arrives at the barrier when all earlier copies of this thread are done; one of its expected arrivals.
__device__ __forceinline__ void copy_async_arrive(u32 bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

}  // namespace jdg::ptx
