// Instructions that the epilogue uses, for one warp of 32 threads of a CPU, in place of the device's, which
// stand here under other names, and are not called.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#define div_rn device_div_rn
#define rcp_rn device_rcp_rn
#define rcp_approx device_rcp_approx
#define ex2_approx device_ex2_approx
#define mul_ftz device_mul_ftz
#define pack_e4m3 device_pack_e4m3
#define load_shared_16 device_load_shared_16
#define load_once device_load_once
#define load_again device_load_again
#define min_nan device_min_nan
#define max_nan device_max_nan
#define forget device_forget
#define max_magnitude_bf16x2 device_max_magnitude_bf16x2
#include_next <jax_deepgemm/ptx/fp8.cuh>
#undef div_rn
#undef rcp_rn
#undef rcp_approx
#undef ex2_approx
#undef mul_ftz
#undef pack_e4m3
#undef load_shared_16
#undef load_once
#undef load_again
#undef min_nan
#undef max_nan
#undef forget
#undef max_magnitude_bf16x2

namespace jdg::ptx {

inline float div_rn(float a, float b) { return a / b; }
inline float rcp_rn(float a) { return 1.0f / a; }
inline float rcp_approx(float a) { return 1.0f / a; }
inline float ex2_approx(float a) { return std::exp2(a); }
inline float mul_ftz(float a, float b) { return a * b; }

inline float min_nan(float a, float b) { return a < b || a != a ? a : b; }
inline float max_nan(float a, float b) { return a > b || a != a ? a : b; }
inline uint4 load_once(const void* at) { return *static_cast<const uint4*>(at); }
inline uint4 load_again(const void* at) { return load_once(at); }
template <class T>
void forget(T&) {}
inline u32 max_magnitude_bf16x2(u32 a, u32 b) {
  u32 larger = 0;
  for (u32 shift : {0u, 16u}) {
    const u32 x = a >> shift & 0x7FFF, y = b >> shift & 0x7FFF;
    const bool of_b = x > 0x7F80 || (y <= 0x7F80 && y > x);
    larger |= (of_b ? y : x) << shift;
  }
  return larger;
}

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
inline int thread_index() { return static_cast<int>(threadIdx.x); }

}  // namespace jdg::ptx
