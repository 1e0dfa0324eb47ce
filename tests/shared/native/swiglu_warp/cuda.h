// Words and intrinsics of CUDA C++ for one warp of 32 threads of a CPU; all lanes reach every one of them.
#pragma once

#include <barrier>
#include <cmath>
#include <cstring>

#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __align__(bytes)

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x, y;
};
inline thread_local Index threadIdx, blockIdx;
inline Index gridDim, blockDim;

inline std::barrier<> lanes(32);
inline unsigned exchanged[32];

inline void __syncwarp() { lanes.arrive_and_wait(); }
inline void __syncthreads() { lanes.arrive_and_wait(); }
template <class To, class From>
To bits_as(From from) {
  To to{};
  std::memcpy(&to, &from, sizeof to < sizeof from ? sizeof to : sizeof from);
  return to;
}
template <class T>
T from_lane(T value, unsigned lane) {
  static_assert(sizeof value <= sizeof exchanged[0]);
  exchanged[threadIdx.x % 32] = bits_as<unsigned>(value);
  lanes.arrive_and_wait();
  const T found = bits_as<T>(exchanged[lane % 32]);
  lanes.arrive_and_wait();
  return found;
}
template <class T>
T __shfl_sync(unsigned, T value, unsigned lane) {
  return from_lane(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  return from_lane(value, threadIdx.x % 32 ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool mine) {
  unsigned all = 0;
  for (unsigned lane = 0; lane < 32; ++lane) all |= from_lane<unsigned>(mine, lane) << lane;
  return all;
}
inline bool __any_sync(unsigned every, bool value) { return __ballot_sync(every, value) != 0; }
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline unsigned __float_as_uint(float v) { return bits_as<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return bits_as<float>(v); }
inline unsigned __cvta_generic_to_shared(const void*) { return 0; }
template <class T>
T* __cvta_generic_to_global(T* at) {
  return at;
}
inline float __fmul_rn(float a, float b) { return a * b; }
template <class T>
T max(T a, T b) {
  return a > b ? a : b;
}
