// What pipeline.cuh takes from ptx/memory.cuh: shared memory as an array.
#pragma once

#include <cstring>
#include <jax_deepgemm/ptx/barrier.cuh>

namespace jdg::ptx {

alignas(16) inline char shared[1 << 12];

inline void store_shared_4(u32 at, int a, int b, int c, int d) {
  const int words[4] = {a, b, c, d};
  std::memcpy(shared + at, words, 16);
}
inline void store_shared_2(u32 at, float a, float b) {
  const float words[2] = {a, b};
  std::memcpy(shared + at, words, 8);
}
inline float2 load_shared_2(u32 at) {
  float2 v;
  std::memcpy(&v, shared + at, 8);
  return v;
}
inline float4 load_shared_4(u32 at) {
  float4 v;
  std::memcpy(&v, shared + at, 16);
  return v;
}

}  // namespace jdg::ptx
