// Bytes of words.
#pragma once

#include <jax_deepgemm/ptx/types.cuh>

namespace jdg::ptx {

// Four of the eight bytes of two words, named by the four lower nibbles of `which`; a nibble's highest bit
// repeats its byte's highest bit instead (PTX ISA 9.7.9, prmt).
__device__ __forceinline__ u32 permute(u32 low, u32 high, u32 which) {
  u32 bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(which));
  return bytes;
}

}  // namespace jdg::ptx
