// Pairs of 16-bit numbers, the first in the low half.
#pragma once

#include <jax_deepgemm/ptx/convert.cuh>

namespace jdg::ptx {

// Two products of float16, rounded to nearest even.
__device__ __forceinline__ u32 multiply_halves(u32 a, u32 b) {
  u32 products;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(products) : "r"(a), "r"(b));
  return products;
}

}  // namespace jdg::ptx
