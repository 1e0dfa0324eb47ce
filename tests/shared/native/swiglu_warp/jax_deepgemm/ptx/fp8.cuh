// What quantize_tile.cuh and swiglu.cuh take of instructions and of CUDA, for one warp of 32 threads of a
// CPU.
#pragma once

#include <barrier>
#include <cmath>
#include <cstring>
#include <jax_deepgemm/ptx/types.cuh>

namespace jdg {
using u8 = unsigned char;

namespace ptx {

inline float div_rn(float a, float b) { return a / b; }
inline float rcp_rn(float a) { return 1.0f / a; }
inline float rcp_approx(float a) { return 1.0f / a; }
inline float ex2_approx(float a) { return std::exp2(a); }
inline float mul_ftz(float a, float b) { return a * b; }
inline void forget(u32&) {}
inline void forget(float&) {}

// To nearest even, saturated; NaN is 0x7F.
inline u16 e4m3(float v) {
  if (v != v) return 0x7F;
  const float magnitude = std::fmin(std::fabs(v), 448.0f);
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const float step = std::exp2(static_cast<float>(std::max(exponent, -5) - 4));
  const float near = std::nearbyint(magnitude / step) * step;
  int bits = 0;
  while (bits < 0x7E) {  // the bits of the number that is `near`
    const int e = bits >> 3, m = bits & 7;
    const float value = e == 0 ? m * std::exp2(-9.0f) : (8 + m) * std::exp2(static_cast<float>(e - 10));
    if (value >= near) break;
    ++bits;
  }
  return static_cast<u16>(bits | (std::signbit(v) ? 0x80 : 0));
}
inline u16 pack_e4m3(float low, float high) { return static_cast<u16>(e4m3(low) | e4m3(high) << 8); }

// Named by what the epilogue does not use.
inline u16 pack_e5m2(float, float) { return 0; }
inline u32 max_magnitude_bf16x2(u32, u32) { return 0; }
inline u32 max_magnitude_f16x2(u32, u32) { return 0; }
inline float half_to_float(u16) { return 0; }
inline void copy_async(u32, const void*, u32) {}
inline void copy_async_commit() {}
inline void copy_async_wait() {}

inline u32 pack_bf16(float low, float high) {
  const auto one = [](float v) {
    const u32 bits = __float_as_uint(v);
    return v != v ? 0x7FFFu : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  };
  return one(low) | one(high) << 16;
}

inline unsigned char shared[1 << 13];
inline void store_shared_pair(u32 at, u16 bytes) { std::memcpy(shared + at, &bytes, 2); }
inline uint4 load_shared_16(u32 at) {
  uint4 v;
  std::memcpy(&v, shared + at, 16);
  return v;
}
inline uint4 load_once(const void* at) {
  uint4 v;
  std::memcpy(&v, at, 16);
  return v;
}
inline int thread_index() { return static_cast<int>(threadIdx.x); }

}  // namespace ptx
}  // namespace jdg
