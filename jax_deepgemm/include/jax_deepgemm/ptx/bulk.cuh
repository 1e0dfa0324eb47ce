// Copies of plain bytes into shared memory, counted by an mbarrier (PTX ISA 9.7.9.25 and 9.7.13.15.16).
#pragma once

#include <jax_deepgemm/ptx/copy.cuh>

namespace jdg::ptx {

// So many bytes, a multiple of 16, between addresses that are multiples of 16.
__device__ __forceinline__ void bulk_load(u32 smem, const void* from, u32 bytes, u32 bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(bar)
      : "memory");
}

// The same of bytes that nobody will read again: their lines are the first to leave L2.
__device__ __forceinline__ void bulk_load_once(u32 smem, const void* from, u32 bytes, u32 bar) {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], %4;" ::"r"(smem),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(bar), "l"(policy)
      : "memory");
}

}  // namespace jdg::ptx
