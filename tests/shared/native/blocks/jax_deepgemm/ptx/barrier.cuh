// What dispatch.cuh and topk.cuh take from CUDA and from ptx/, for CPU threads: one for each thread of each
// block. Lanes of a warp meet where they exchange something, blocks where the device's do.
#pragma once

#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx, gridDim;

struct Warp {
  std::barrier<> lanes{32};
  long long said[32];
};
struct Block {
  explicit Block(int warps, int words) : threads(32 * warps), warp(warps), shared(words, -99) {}
  std::barrier<> threads;
  std::vector<Warp> warp;
  std::vector<int> shared;
};
inline thread_local Block* block;
inline thread_local std::barrier<>* cluster;
inline thread_local std::optional<std::barrier<>::arrival_token> arrived;
inline thread_local Block** of_cluster;

inline Warp& this_warp() { return block->warp[threadIdx.x / 32]; }
inline void __syncwarp() { this_warp().lanes.arrive_and_wait(); }
inline void __syncthreads() { block->threads.arrive_and_wait(); }

// What combine(lane, its value) makes of all lanes.
template <class T, class Combine>
void exchange(T value, const Combine& combine) {
  Warp& warp = this_warp();
  warp.said[threadIdx.x % 32] = static_cast<long long>(value);
  warp.lanes.arrive_and_wait();
  for (unsigned lane = 0; lane < 32; ++lane) combine(lane, static_cast<T>(warp.said[lane]));
  warp.lanes.arrive_and_wait();
}
inline int __reduce_add_sync(unsigned, int value) {
  int sum = 0;
  exchange(value, [&](unsigned, int other) { sum += other; });
  return sum;
}
inline unsigned __match_any_sync(unsigned, int value) {
  unsigned same = 0;
  exchange(value, [&](unsigned lane, int other) { same |= (other == value ? 1u : 0u) << lane; });
  return same;
}
template <class T>
T __shfl_sync(unsigned, T value, unsigned wanted) {
  T found = value;
  exchange(value, [&](unsigned lane, T other) { found = lane == wanted ? other : found; });
  return found;
}
template <class T>
T __shfl_up_sync(unsigned all, T value, unsigned step) {
  const unsigned mine = threadIdx.x % 32;
  return __shfl_sync(all, value, mine >= step ? mine - step : mine);
}
inline bool __any_sync(unsigned, bool value) {
  bool any = false;
  exchange(value, [&](unsigned, bool other) { any |= other; });
  return any;
}
inline bool __all_sync(unsigned all, bool value) { return !__any_sync(all, !value); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline int __clzll(long long bits) {
  return bits == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(bits));
}
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
template <class T>
T atomicAdd(T* at, T value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
inline void atomicMax(unsigned* at, unsigned value) {
  unsigned old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (old < value &&
         !__atomic_compare_exchange_n(at, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}
template <class To, class From>
To same_bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned v) { return same_bits<float>(v); }
inline unsigned __float_as_uint(float v) { return same_bits<unsigned>(v); }

struct uint4 {
  unsigned x, y, z, w;
};

namespace jdg {

using u16 = unsigned short;
using u32 = unsigned;
using u64 = unsigned long long;
using i64 = long long;

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int align_up(int a, int b) { return ceil_div(a, b) * b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

namespace ptx {
inline void cluster_arrive() { arrived = cluster->arrive(); }
inline void cluster_wait() { cluster->wait(std::move(*arrived)); }
inline void let_next_kernel_start() {}  // there is none
}  // namespace ptx

}  // namespace jdg
