// Bulk tensor copies between global and shared memory, and reductions into global memory (PTX ISA 9.7.9.25).
#pragma once

#include <jax_deepgemm/ptx/types.cuh>

namespace jdg::ptx {

// Loads of boxes of tensors of rank 1 to 5. Coordinates innermost first, as many as the tensor has axes.
// Bytes outside the tensor arrive as zeros and count like the others on `bar`.
__device__ __forceinline__ void tma_load(u32 smem, const TensorMap& map, u32 bar, int x) {
  asm volatile(
      "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3}], [%2];" ::
          "r"(smem),
      "l"(&map), "r"(bar), "r"(x)
      : "memory");
}
__device__ __forceinline__ void tma_load(u32 smem, const TensorMap& map, u32 bar, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(smem),
      "l"(&map), "r"(bar), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tma_load(u32 smem, const TensorMap& map, u32 bar, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(smem),
      "l"(&map), "r"(bar), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ __forceinline__ void tma_load(u32 smem, const TensorMap& map, u32 bar, int x, int y, int z,
                                         int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem),
      "l"(&map), "r"(bar), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
__device__ __forceinline__ void tma_load(u32 smem, const TensorMap& map, u32 bar, int x, int y, int z, int w,
                                         int v) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(smem),
      "l"(&map), "r"(bar), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v)
      : "memory");
}

// The same, rank 3 and 4, of bytes that nobody will read again: their lines are the first to leave L2, and
// need not wait until dirty lines have been written back. (A hint of the normal policy is dearer than none:
// docs/performance_log.md.)
__device__ __forceinline__ void tma_load_once(u32 smem, const TensorMap& map, u32 bar, int x, int y, int z) {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(smem),
      "l"(&map), "r"(bar), "r"(x), "r"(y), "r"(z), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void tma_load_once(u32 smem, const TensorMap& map, u32 bar, int x, int y, int z,
                                              int w) {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(smem),
      "l"(&map), "r"(bar), "r"(x), "r"(y), "r"(z), "r"(w), "l"(policy)
      : "memory");
}

// Shared to global memory; elements outside the tensor are not written.
__device__ __forceinline__ void tma_store(const TensorMap& map, u32 smem, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(smem), "r"(x), "r"(y), "r"(z)
               : "memory");
}

// Adds floats to what lies there, rounded to nearest even; subnormal numbers count as zero.
__device__ __forceinline__ void tma_reduce_add(const TensorMap& map, u32 smem, int x, int y, int z) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
          &map),
      "r"(smem), "r"(x), "r"(y), "r"(z)
      : "memory");
}

__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until all of this thread's committed groups but the last PENDING have read their shared memory.
template <int PENDING = 0>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

}  // namespace jdg::ptx
