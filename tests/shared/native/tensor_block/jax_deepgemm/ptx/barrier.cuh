// CUDA's words, and mbarriers, for one block of threads, a fiber each: lanes of a warp meet where they
// exchange something. An mbarrier counts arrivals and bytes, and its phases have a parity, as in PTX ISA
// 9.7.13.15.
#pragma once

#include <fibers.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes)

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct Index {
  unsigned x, y;
};
#define threadIdx (Index{fibers.thread(), 0})
inline Index blockIdx, gridDim, blockDim;

struct Warp {
  Barrier lanes{32};
  unsigned long long said[32];
};
inline std::vector<Warp>* warps;
inline Barrier* threads;

inline Warp& this_warp() { return (*warps)[threadIdx.x / 32]; }
inline void __syncwarp() { this_warp().lanes.arrive_and_wait(); }
inline void __syncthreads() { threads->arrive_and_wait(); }

template <class T, class Combine>
void exchange(T value, const Combine& combine) {
  Warp& warp = this_warp();
  std::memcpy(&warp.said[threadIdx.x % 32], &value, sizeof value);
  warp.lanes.arrive_and_wait();
  for (unsigned lane = 0; lane < 32; ++lane) {
    T other;
    std::memcpy(&other, &warp.said[lane], sizeof other);
    combine(lane, other);
  }
  warp.lanes.arrive_and_wait();
}
template <class T>
T from_lane(T value, unsigned wanted) {
  T found = value;
  exchange(value, [&](unsigned lane, T other) { found = lane == wanted % 32 ? other : found; });
  return found;
}
template <class T>
T __shfl_sync(unsigned, T value, unsigned lane) {
  return from_lane(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned step) {
  return from_lane(value, threadIdx.x ^ step);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
  return from_lane(value, threadIdx.x % 32 >= step ? threadIdx.x - step : threadIdx.x);
}
inline int __reduce_min_sync(unsigned, int value) {
  int least = value;
  exchange(value, [&](unsigned, int other) { least = other < least ? other : least; });
  return least;
}
inline int __reduce_max_sync(unsigned, int value) {
  int most = value;
  exchange(value, [&](unsigned, int other) { most = other > most ? other : most; });
  return most;
}
inline int max(int a, int b) { return a > b ? a : b; }
inline int __clz(unsigned v) { return v ? __builtin_clz(v) : 32; }
inline int min(int a, int b) { return a < b ? a : b; }
inline float fmaxf(float a, float b) { return std::fmax(a, b); }
inline float fabsf(float v) { return std::fabs(v); }

inline int __float_as_int(float v) { return __builtin_bit_cast(int, v); }
inline float __int_as_float(int v) { return __builtin_bit_cast(float, v); }
inline unsigned __float_as_uint(float v) { return __builtin_bit_cast(unsigned, v); }
inline float __uint_as_float(unsigned v) { return __builtin_bit_cast(float, v); }

namespace jdg {
alignas(1024) inline char shared[232448];
}
inline unsigned __cvta_generic_to_shared(const void* p) {
  return static_cast<unsigned>(static_cast<const char*>(p) - jdg::shared);
}

#include <jax_deepgemm/ptx/types.cuh>

namespace jdg::ptx {

struct Mbarrier {
  int arrivals = 0, pending = 0, bytes = 0;
  u32 parity = 0;  // of the phase under way

  void count(int arrived, int expected) {
    if (arrived > pending) std::abort();
    pending -= arrived, bytes += expected;
    if (pending > 0 || bytes > 0) return;
    pending = arrivals, parity ^= 1;
  }
};
inline std::map<u32, Mbarrier> barriers;

inline void mbarrier_init(u32 bar, int arrivals) {
  barriers[bar].arrivals = barriers[bar].pending = arrivals;
  barriers[bar].parity = 0, barriers[bar].bytes = 0;
}
inline void mbarrier_arrive(u32 bar) { barriers.at(bar).count(1, 0); }
inline void mbarrier_expect_bytes(u32 bar, int bytes) { barriers.at(bar).count(1, bytes); }
inline void mbarrier_wait(u32 bar, u32 parity) {
  const Mbarrier& at = barriers.at(bar);
  fibers.wait([&] { return at.parity != parity; });
}
inline bool mbarrier_test(u32 bar, u32 parity) { return barriers.at(bar).parity != parity; }
inline void fence_mbarrier_init() {}
inline void fence_proxy_async() {}
inline bool elect() { return threadIdx.x % 32 == 0; }
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

inline std::map<std::pair<int, int>, Barrier> named;
inline Barrier& named_at(int id, int threads) {
  return named.try_emplace({id, threads}, threads).first->second;
}
template <int ID, int THREADS>
void named_barrier() {
  named_at(ID, THREADS).arrive_and_wait();
}

}  // namespace jdg::ptx
