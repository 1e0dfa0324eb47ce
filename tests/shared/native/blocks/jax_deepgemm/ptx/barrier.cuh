// What dispatch.cuh takes from CUDA and from ptx/, for CPU threads: one for each thread of each block. Lanes
// of a warp meet where they exchange something, blocks where the device's do.
#pragma once

#include <barrier>
#include <memory>
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
inline int __shfl_up_sync(unsigned, int value, unsigned step) {
  const unsigned mine = threadIdx.x % 32, wanted = mine >= step ? mine - step : mine;
  int found = value;
  exchange(value, [&](unsigned lane, int other) { found = lane == wanted ? other : found; });
  return found;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int atomicAdd(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }

namespace jdg {

using u32 = unsigned;

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int align_up(int a, int b) { return ceil_div(a, b) * b; }
inline int min(int a, int b) { return a < b ? a : b; }

namespace ptx {
inline void cluster_arrive() {}
inline void cluster_wait() { cluster->arrive_and_wait(); }
inline void let_next_kernel_start() {}  // there is none
}  // namespace ptx

}  // namespace jdg
