// What group_table.cuh takes from other device headers, for one warp of 32 threads of a CPU: shuffles and
// barriers that all lanes reach, shared memory as an array.
#pragma once

#include <barrier>
#include <cstring>

#define __device__
#define __forceinline__ inline

struct float4 {
  float x, y, z, w;
};
inline thread_local struct {
  unsigned x;
} threadIdx;

inline std::barrier<> lanes(32);
inline long long exchanged[32];

inline void __syncwarp() { lanes.arrive_and_wait(); }
inline void __syncthreads() { lanes.arrive_and_wait(); }

template <class T>
T from_lane(T value, unsigned lane) {
  exchanged[threadIdx.x] = static_cast<long long>(value);
  lanes.arrive_and_wait();
  const T found = static_cast<T>(exchanged[lane]);
  lanes.arrive_and_wait();
  return found;
}
template <class T>
T __shfl_sync(unsigned, T value, unsigned lane) {
  return from_lane(value, lane);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
  return from_lane(value, threadIdx.x >= step ? threadIdx.x - step : threadIdx.x);
}

template <class To, class From>
To bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline int __float_as_int(float v) { return bits<int>(v); }
inline float __int_as_float(int v) { return bits<float>(v); }

namespace jdg {

using u32 = unsigned;
using i64 = long long;

struct Extents {
  int m, n, batches, batched_c, stripe;
};
template <class C>
struct Layout {
  static constexpr u32 kTable = 64;
};

inline int max(int a, int b) { return a > b ? a : b; }
constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

namespace ptx {
inline char shared[1 << 16];
inline void store_shared_4(u32 at, int a, int b, int c, int d) {
  const int words[4] = {a, b, c, d};
  std::memcpy(shared + at, words, 16);
}
inline void store_shared(u32 at, float v) { std::memcpy(shared + at, &v, 4); }
inline float load_shared(u32 at) {
  float v;
  std::memcpy(&v, shared + at, 4);
  return v;
}
inline float4 load_shared_4(u32 at) {
  float4 v;
  std::memcpy(&v, shared + at, 16);
  return v;
}
}  // namespace ptx

}  // namespace jdg
