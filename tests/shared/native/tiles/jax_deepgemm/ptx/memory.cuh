// What a GEMM's main loop takes from ptx/memory.cuh: an SM's shared memory as an array.
#pragma once

#include <cstring>
#include <jax_deepgemm/ptx/barrier.cuh>

namespace jdg::ptx {

alignas(1024) inline char shared[1 << 18];
inline thread_local int lane = 0;  // which of its warp's a thread stands for, beside lane 0

inline int thread_index() { return static_cast<int>(threadIdx.x) + lane; }
inline void store_shared_4(u32 at, int a, int b, int c, int d) {
  const int words[4] = {a, b, c, d};
  std::memcpy(shared + at, words, 16);
}
inline void store_shared_byte(u32 at, int value) { shared[at] = static_cast<char>(value); }
inline void store_shared_2(u32 at, float a, float b) {
  const float words[2] = {a, b};
  std::memcpy(shared + at, words, 8);
}
inline float load_shared(u32 at) {
  float v;
  std::memcpy(&v, shared + at, 4);
  return v;
}
inline float2 load_shared_2(u32 at) { return {load_shared(at), load_shared(at + 4)}; }
inline float4 load_shared_4(u32 at) {
  return {load_shared(at), load_shared(at + 4), load_shared(at + 8), load_shared(at + 12)};
}

inline void forget(int&) {}
inline bool elect() { return threadIdx.x % 32 == 0; }
inline void fence_mbarrier_init() {}
inline void fence_proxy_async() {}
inline void warpgroup_barrier(int) {}

}  // namespace jdg::ptx
