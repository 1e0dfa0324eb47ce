// Powers and reciprocals.
#pragma once

#include <jax_deepgemm/ptx/mma.cuh>

inline unsigned __ballot_sync(unsigned, bool value) {
  unsigned all = 0;
  exchange(value, [&](unsigned lane, bool other) { all |= (other ? 1u : 0u) << lane; });
  return all;
}

namespace jdg::ptx {

inline float ex2_approx(float v) { return std::exp2(v); }
inline float rcp_approx(float v) { return 1.0f / v; }
inline u32 pack_f16(float low, float high) {
  const auto bits = [](float v) { return __builtin_bit_cast(u16, static_cast<_Float16>(v)); };
  return bits(low) | static_cast<u32>(bits(high)) << 16;
}

}  // namespace jdg::ptx
