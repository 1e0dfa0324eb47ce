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
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx;
inline Index gridDim, blockDim;

inline std::barrier<> lanes(32);
inline float exchanged[32];

inline void __syncwarp() { lanes.arrive_and_wait(); }
inline void __syncthreads() { lanes.arrive_and_wait(); }
inline float from_lane(float value, unsigned lane) {
  exchanged[threadIdx.x % 32] = value;
  lanes.arrive_and_wait();
  const float found = exchanged[lane % 32];
  lanes.arrive_and_wait();
  return found;
}
inline float __shfl_sync(unsigned, float value, unsigned lane) { return from_lane(value, lane); }
inline float __shfl_xor_sync(unsigned, float value, unsigned mask) {
  return from_lane(value, threadIdx.x % 32 ^ mask);
}
inline bool __any_sync(unsigned, bool value) {
  bool any = false;
  for (unsigned lane = 0; lane < 32; ++lane) any |= from_lane(value, lane) != 0;
  return any;
}

template <class To, class From>
To bits_as(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float v) { return bits_as<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return bits_as<float>(v); }
inline unsigned __cvta_generic_to_shared(const void*) { return 0; }
template <class T>
T max(T a, T b) {
  return a > b ? a : b;
}
