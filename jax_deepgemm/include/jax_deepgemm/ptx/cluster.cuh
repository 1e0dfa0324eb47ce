// What a block does in the shared memory of another block of its cluster (PTX ISA 9.7.9), and loads of
// numbers that no block writes.
#pragma once

#include <jax_deepgemm/ptx/barrier.cuh>
#include <jax_deepgemm/ptx/fp8.cuh>

namespace jdg::ptx {

// What the same variable of block `rank` is, behind a barrier of the cluster.
__device__ __forceinline__ u32 load_from_block(const u32* at, u32 rank) {
  u32 v;
  asm volatile("ld.shared::cluster.u32 %0, [%1];"
               : "=r"(v)
               : "r"(map_to_rank(smem_address(at), rank))
               : "memory");
  return v;
}

// Stores to the same variable of block `rank`, which sees it after a barrier of the cluster.
__device__ __forceinline__ void store_in_block(u64* at, u32 rank, u64 v) {
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(map_to_rank(smem_address(at), rank)), "l"(v)
               : "memory");
}

// 16 bytes, or all ones; without a branch, so that all loads of a thread come first.
__device__ __forceinline__ uint4 load_or_ones(bool wanted, const void* at) {
  uint4 v;
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.u32 wanted, %5, 0;\n"
      "mov.b32 %0, -1;\n"
      "mov.b32 %1, -1;\n"
      "mov.b32 %2, -1;\n"
      "mov.b32 %3, -1;\n"
      "@wanted ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(at), "r"(static_cast<u32>(wanted)));
  return v;
}

// So many bytes, a multiple of 16, into L2 (PTX ISA 9.7.9, cp.async.bulk.prefetch).
__device__ __forceinline__ void prefetch_bulk(const void* at, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(at)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ u32 load_constant(const u32* at) { return __ldg(at); }
__device__ __forceinline__ u16 load_constant(const u16* at) { return __ldg(at); }

}  // namespace jdg::ptx
