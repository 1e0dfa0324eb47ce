// Shared memory as an array, and conversions.
#pragma once

#include <jax_deepgemm/ptx/barrier.cuh>

namespace jdg::ptx {

template <class T>
T load_from(u32 at) {
  if (at % sizeof(T) || at + sizeof(T) > sizeof shared) std::abort();
  T v;
  std::memcpy(&v, shared + at, sizeof v);
  return v;
}
inline float load_shared(u32 at) { return load_from<float>(at); }
inline float2 load_shared_2(u32 at) { return load_from<float2>(at); }
inline float4 load_shared_4(u32 at) { return load_from<float4>(at); }
inline void store_shared(u32 at, float v) { std::memcpy(shared + at, &v, 4); }
inline void store_shared_4(u32 at, int a, int b, int c, int d) {
  const int words[4] = {a, b, c, d};
  std::memcpy(shared + at, words, 16);
}
inline void store_shared_2(u32 at, float a, float b) {
  const float words[2] = {a, b};
  std::memcpy(shared + at, words, 8);
}
inline bf16 to_bf16(float v) {
  const u32 bits = __float_as_uint(v);
  return {static_cast<u16>(v != v ? 0x7FFFu : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

inline void store_global(float* to, float v) { *to = v; }
inline void store_global(bf16* to, float v) { *to = to_bf16(v); }

template <int REGISTERS>
void raise_registers() {}
template <int REGISTERS>
void lower_registers() {}

}  // namespace jdg::ptx
