// Products of one warp, whose lanes tell each other what they have.
#pragma once

#include <jax_deepgemm/ptx/memory.cuh>

namespace jdg::ptx {

inline u32 pack_bf16(float low, float high) {
  return to_bf16(low).bits | static_cast<u32>(to_bf16(high).bits) << 16;
}
inline u32 pack_relu_bf16(float low, float high) {
  const auto relu = [](float v) { return v < 0 ? 0.0f : v; };
  return pack_bf16(relu(low), relu(high));
}

inline void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  const auto number = [](u32 two, int i) { return __uint_as_float(i ? two & 0xFFFF0000u : two << 16); };
  float rows[16][16], cols[16][8];
  for (int i = 0; i < 4; ++i)
    exchange(a[i], [&](unsigned lane, u32 two) {
      for (int e = 0; e < 2; ++e) rows[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + e] = number(two, e);
    });
  for (int i = 0; i < 2; ++i)
    exchange(b[i], [&](unsigned lane, u32 two) {
      for (int e = 0; e < 2; ++e) cols[lane % 4 * 2 + i * 8 + e][lane / 4] = number(two, e);
    });
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) d[i] += rows[lane / 4 + i / 2 * 8][k] * cols[k][lane % 4 * 2 + i % 2];
}

}  // namespace jdg::ptx
