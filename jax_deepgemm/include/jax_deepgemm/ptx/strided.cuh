// Descriptors of operands whose groups of 8 rows of 128 bytes, swizzled, do not lie one behind the other (PTX
// ISA 9.7.15.5.1).
#pragma once

#include <jax_deepgemm/ptx/types.cuh>

namespace jdg::ptx {

// Both strides in bytes, multiples of 16: from a group to the next one, and, of an MN-major operand, from a
// slab of 64 elements to the next one.
template <int GROUP, int SLAB = 16>
struct StridedDescriptor {
  u32 low;

  __device__ __forceinline__ explicit StridedDescriptor(u32 smem)
      : low(static_cast<u32>(SLAB >> 4) << 16 | (smem & 0x3FFFF) >> 4) {}
  __device__ __forceinline__ u64 plus(int bytes) const {
    constexpr u64 kSwizzle128 = 1ull << 62;
    return kSwizzle128 | static_cast<u64>(GROUP >> 4) << 32 | (low + bytes / 16);
  }
};

}  // namespace jdg::ptx
