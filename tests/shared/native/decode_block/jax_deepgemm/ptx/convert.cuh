// E4M3 as bf16 or f16.
#pragma once

#include <jax_deepgemm/ptx/fp8.cuh>

namespace jdg::ptx {

inline float e4m3_number(unsigned byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const float size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return byte & 128 ? -size : size;
}
template <bool F16, int FIRST, int SECOND>
u32 e4m3_bytes(u32 word) {
  const float low = e4m3_number(word >> 8 * FIRST & 255), high = e4m3_number(word >> 8 * SECOND & 255);
  return F16 ? pack_f16(low, high) : pack_bf16(low, high);
}

}  // namespace jdg::ptx
