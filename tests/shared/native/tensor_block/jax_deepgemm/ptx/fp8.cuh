// FP8 numbers: what rounds to them, and what they are.
#pragma once

#include <jax_deepgemm/ptx/wgmma.cuh>

namespace jdg::ptx {

// The nearest of all numbers; of two as near the one with an even last bit. NaN stays.
inline u32 to_e4m3(float v) {
  if (v != v) return 127;
  u32 nearest = 0;
  for (u32 bits = 1; bits < 127; ++bits) {
    const float before = std::fabs(e4m3(nearest) - std::fabs(v)), now = std::fabs(e4m3(bits) - std::fabs(v));
    if (now < before || (now == before && bits % 2 == 0)) nearest = bits;
  }
  return nearest | (std::signbit(v) ? 128u : 0u);
}
inline u16 pack_e4m3(float low, float high) { return static_cast<u16>(to_e4m3(low) | to_e4m3(high) << 8); }
inline float2 unpack_e4m3(u16 two) { return {e4m3(two & 255u), e4m3(two >> 8)}; }

}  // namespace jdg::ptx
