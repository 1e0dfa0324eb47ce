// The numbers of the quantising kernels: FP8 formats that are written, and eight neighbours that a thread
// reads.
#pragma once

#include <jax_deepgemm/ptx/fp8.cuh>

namespace jdg {

constexpr int kWide = 8;  // columns of a thread
constexpr float kInfinity = __builtin_bit_cast(float, 0x7F800000);

struct E4m3 {
  static constexpr float kMax = 448.0f;
  static constexpr bool kHasInfinity = false;
  __device__ __forceinline__ static u16 pack(float low, float high) { return ptx::pack_e4m3(low, high); }
};

struct E5m2 {
  static constexpr float kMax = 57344.0f;
  static constexpr bool kHasInfinity = true;
  __device__ __forceinline__ static u16 special(float v) {
    return v != v ? 0x7E : (__float_as_uint(v) >> 24 & 0x80) | 0x7C;
  }
  __device__ __forceinline__ static u16 pack(float low, float high) {
    u16 packed = ptx::pack_e5m2(low, high);
    if (!(fabsf(low) < kInfinity)) packed = (packed & 0xFF00) | special(low);
    if (!(fabsf(high) < kInfinity)) packed = (packed & 0x00FF) | special(high) << 8;
    return packed;
  }
};

template <class Fp8>
__device__ __forceinline__ u32 pack_four(float a, float b, float c, float d) {
  return Fp8::pack(a, b) | static_cast<u32>(Fp8::pack(c, d)) << 16;
}

// Eight neighbouring numbers of a row, as they lie in memory.
template <class T>
struct Chunk {
  static constexpr u32 kInfinite = is_same<T, bf16> ? 0x7F80 : 0x7C00,
                       kQuiet = is_same<T, bf16> ? 0x40 : 0x200;
  u32 pairs[4];
  __device__ __forceinline__ void clear() { pairs[0] = pairs[1] = pairs[2] = pairs[3] = 0; }
  __device__ __forceinline__ void set(int i, T v) { pairs[i / 2] |= static_cast<u32>(v.bits) << i % 2 * 16; }
  template <bool AGAIN = false>
  __device__ __forceinline__ void load(const T* at) {
    take(AGAIN ? ptx::load_again(at) : ptx::load_once(at));
  }
  __device__ __forceinline__ void take(uint4 v) {
    pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
  }
  __device__ __forceinline__ static float unpacked(u32 pair, int i) {
    if constexpr (is_same<T, bf16>)
      return __uint_as_float(i ? pair & 0xFFFF0000u : pair << 16);
    else
      return ptx::half_to_float(static_cast<u16>(pair >> i * 16));
  }
  __device__ __forceinline__ float operator[](int i) const { return unpacked(pairs[i / 2], i % 2); }
  __device__ __forceinline__ static u32 larger(u32 a, u32 b) {
    return is_same<T, bf16> ? ptx::max_magnitude_bf16x2(a, b) : ptx::max_magnitude_f16x2(a, b);
  }
  __device__ __forceinline__ void infinities_to_nan() {
#pragma unroll
    for (u32& pair : pairs) {
      if ((pair & 0x7FFF) == kInfinite) pair |= kQuiet;
      if ((pair >> 16 & 0x7FFF) == kInfinite) pair |= kQuiet << 16;
    }
  }
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (u32& pair : pairs) ptx::forget(pair);
  }
};

template <>
struct Chunk<float> {
  float v[kWide];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& one : v) one = 0.0f;
  }
  __device__ __forceinline__ void set(int i, float one) { v[i] = one; }
  template <bool AGAIN = false>
  __device__ __forceinline__ void load(const float* at) {
#pragma unroll
    for (int i = 0; i < kWide; i += 4) {
      const uint4 four = AGAIN ? ptx::load_again(at + i) : ptx::load_once(at + i);
      v[i] = __uint_as_float(four.x), v[i + 1] = __uint_as_float(four.y);
      v[i + 2] = __uint_as_float(four.z), v[i + 3] = __uint_as_float(four.w);
    }
  }
  __device__ __forceinline__ float operator[](int i) const { return v[i]; }
  __device__ __forceinline__ void infinities_to_nan() {
#pragma unroll
    for (float& one : v)
      if (fabsf(one) == kInfinity) one = __uint_as_float(0x7FC00000);
  }
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (float& one : v) ptx::forget(one);
  }
};

// Columns from `left` < 8 on and everything where !inside are zero. ALIGNED: left is at least 8 or at most 0.
// AGAIN: other blocks of threads will read it as well.
template <class T, bool ALIGNED, bool AGAIN = false>
__device__ __forceinline__ void load_chunk(Chunk<T>& chunk, const T* at, bool inside, int left) {
  chunk.clear();
  if constexpr (ALIGNED) {
    if (inside && left > 0) chunk.template load<AGAIN>(at);
  } else {
#pragma unroll
    for (int i = 0; i < kWide; ++i)
      if (inside && i < left) chunk.set(i, at[i]);
  }
}

}  // namespace jdg
