// Warpgroup matrix multiply (PTX ISA 9.7.15): descriptors and ordering. The instruction itself, whose
// register list depends on its width, is generated for the one width that a kernel uses (jit/wgmma.py). A may
// come from registers there.
#pragma once

#include <jax_deepgemm/ptx/types.cuh>

namespace jdg::ptx {

// Where an operand lies in shared memory (128-byte swizzle, atoms of 8 rows of 128 bytes). The high word is
// the same for all of them, so only the low one takes instructions; 16 bytes further on is 1 more.
struct Descriptor {
  u32 low;

  __device__ __forceinline__ u64 plus(int bytes) const {
    constexpr u64 kSwizzle128 = 1ull << 62, kStrideBytes = 1024;
    return kSwizzle128 | (kStrideBytes >> 4) << 32 | (low + bytes / 16);
  }
};

// K-major operand: rows of 128 bytes. 32 bytes of k are 32 bytes further on.
__device__ __forceinline__ Descriptor k_major_descriptor(u32 smem) {
  return {1u << 16 | ((smem & 0x3FFFF) >> 4)};
}

// MN-major operand: slabs of 64 elements (128 bytes) by `slab_bytes / 128` values of k. 16 values of k are
// 2048 bytes further on.
__device__ __forceinline__ Descriptor mn_major_descriptor(u32 smem, u32 slab_bytes) {
  return {(slab_bytes >> 4) << 16 | ((smem & 0x3FFFF) >> 4)};
}

// Registers written by ordinary instructions may now be used by wgmma.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most PENDING committed groups are unfinished.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving accumulator registers across this point, where ptxas would serialise
// (C7514).
template <int COUNT>
__device__ __forceinline__ void pin(float (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// The same of an operand in registers, written before the fence.
template <int A, int B>
__device__ __forceinline__ void pin(u32 (&registers)[A][B]) {
#pragma unroll
  for (int i = 0; i < A * B; ++i) asm volatile("" : "+r"(registers[i / B][i % B])::"memory");
}

}  // namespace jdg::ptx
