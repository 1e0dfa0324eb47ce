// Copies of tokens in the order of their experts: a stable counting sort in one launch.
//
//   ids [copies]  ->  sizes [experts], source [rows], position [copies]
//
// A warp has a run of neighbouring copies, a block the runs of its warps.
//
//   count   each warp counts its run, in shared memory: counts[warp][expert]
//   sum     a thread for each expert: counts become those of the warps before; the block's goes to memory
//   meet    one block: nothing to wait for; a cluster: its barrier; a grid: a counter that was set to zero
//   first   a warp for each expert adds the blocks up, all of them and those before this one, and a scan over
//           experts gives the first row of each; with a capacity an expert begins at its own multiple of it
//   place   each warp goes over its run again, 32 copies at a time; lanes with the same expert find each
//           other, and a lane's copy comes behind those of the lanes before it
//   rest    rows that hold no copy
//
// shared memory:  counts[WARPS][experts] | first[experts] | total[experts] | sums[WARPS]
//
// Hazards: a warp's counts are its own but for `sum`, so __syncwarp orders them elsewhere. `sum` writes to
// memory what other blocks read after the meeting, never before it, past L1.
#pragma once

#include <jax_deepgemm/ptx/barrier.cuh>
#include <jax_deepgemm/ptx/grid.cuh>

namespace jdg {

enum class Meeting { kAlone, kCluster, kGrid };

// What a kernel is told at compile time; ops/dispatch/sm90.py writes it as `struct Config`.
// clang-format off
template <class C>
concept DispatchConfig = requires {
  C::WARPS;     // of a block, at most 32
  C::MEETING;   // Meeting: how blocks wait for each other
  C::WIDTH;     // the grid has at most 32 times so many blocks
  C::CAPACITY;  // bool: whether all experts have the same number of rows, used or not
  C::OF_ROWS;   // bool: whether each row's token and weight are wanted, not the copy that it holds; the kernel is
                // then the first of a chain of launches
};
// clang-format on

struct Dispatch {
  const int* ids;
  int *sizes, *source, *position;
  int* blocks;   // [experts][gridDim.x]: copies that each block has; nullptr if there is one
  u32* arrived;  // zero; of a grid
  int copies, experts, capacity;
  int* token;  // OF_ROWS
  float* row_weights;
  const float* weights;
  int slots;  // copies of a token

  __device__ __forceinline__ bool has(int expert) const {
    return static_cast<u32>(expert) < static_cast<u32>(experts);
  }
};

constexpr u32 kAllLanes = 0xFFFFFFFF;
constexpr int kAtOnce = 4;  // loads of a lane that are under way together

template <class C>
struct Place {
  static constexpr int THREADS = 32 * C::WARPS;
  int warp, lane, begin, end;  // the copies of this warp

  __device__ __forceinline__ explicit Place(int copies)
      : warp(static_cast<int>(threadIdx.x) / 32), lane(static_cast<int>(threadIdx.x) % 32) {
    const int run = align_up(ceil_div(copies, static_cast<int>(gridDim.x) * C::WARPS), 32);
    begin = min((static_cast<int>(blockIdx.x) * C::WARPS + warp) * run, copies);
    end = min(begin + run, copies);
  }
  __device__ __forceinline__ int thread_of_grid() const {
    return static_cast<int>(blockIdx.x * THREADS + threadIdx.x);
  }
  __device__ __forceinline__ int threads_of_grid() const { return static_cast<int>(gridDim.x) * THREADS; }
};

// visit(i, expert) by all lanes together, for each of the warp's copies i; -1 for the lanes behind the last.
template <class C, class Visit>
__device__ __forceinline__ void for_each_copy(const Dispatch& d, const Place<C>& at, const Visit& visit) {
  for (int first = at.begin; first < at.end; first += 32 * kAtOnce) {
    int expert[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = first + 32 * k + at.lane;
      expert[k] = i < at.end ? d.ids[i] : -1;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (first + 32 * k < at.end) visit(first + 32 * k + at.lane, expert[k]);
  }
}

// Row `row` holds this copy; `copies`: none.
template <class C>
__device__ __forceinline__ void hold(const Dispatch& d, int row, int copy) {
  if constexpr (C::OF_ROWS) {
    d.token[row] = copy / d.slots;
    d.row_weights[row] = copy < d.copies ? d.weights[copy] : 0.0f;
  } else {
    d.source[row] = copy;
  }
}

template <class C>
__device__ __forceinline__ void count_run(const Dispatch& d, const Place<C>& at, int* mine) {
  for (int e = at.lane; e < d.experts; e += 32) mine[e] = 0;
  __syncwarp();
  for_each_copy(d, at, [&](int, int expert) {
    if (d.has(expert)) atomicAdd(mine + expert, 1);
  });
}

// Counts of the warps become those of the warps before; found(expert, count) is told the block's.
template <class C, class Found>
__device__ __forceinline__ void sum_warps(int* counts, int experts, const Found& found) {
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += Place<C>::THREADS) {
    int before = 0;
#pragma unroll 8
    for (int warp = 0; warp < C::WARPS; ++warp) {
      int& here = counts[warp * experts + e];
      const int count = here;
      here = before;
      before += count;
    }
    found(e, before);
  }
}

// total: copies that all blocks have of an expert; first: those of the blocks before this one.
template <class C>
__device__ __forceinline__ void sum_blocks(const Dispatch& d, const Place<C>& at, int* first, int* total) {
  const int blocks = static_cast<int>(gridDim.x), here = static_cast<int>(blockIdx.x);
  for (int begin = at.warp; begin < d.experts; begin += C::WARPS * kAtOnce) {
    int all[kAtOnce] = {}, before[kAtOnce] = {};
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int e = begin + k * C::WARPS;
#pragma unroll
      for (int block = at.lane; block < 32 * C::WIDTH; block += 32) {
        if (e >= d.experts || block >= blocks) continue;
        const int count = ptx::load_shared_by_blocks(d.blocks + e * blocks + block);
        all[k] += count;
        before[k] += block < here ? count : 0;
      }
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int e = begin + k * C::WARPS;
      const int sum = __reduce_add_sync(kAllLanes, all[k]), earlier = __reduce_add_sync(kAllLanes, before[k]);
      if (at.lane == 0 && e < d.experts) total[e] = sum, first[e] = earlier;
    }
  }
}

// Adds to first[e] the totals of the experts before e; returns the sum of all.
template <class C>
__device__ __forceinline__ int scan_experts(const Place<C>& at, int experts, int* first, const int* total,
                                            int* sums) {
  const int each = ceil_div(experts, Place<C>::THREADS);
  const int begin = min(static_cast<int>(threadIdx.x) * each, experts), end = min(begin + each, experts);
  int own = 0;
  for (int e = begin; e < end; ++e) own += total[e];
  int through = own;  // the sum of this lane and those before
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, through, step);
    if (at.lane >= step) through += other;
  }
  if (at.lane == 31) sums[at.warp] = through;
  __syncthreads();
  const int warps = at.lane < C::WARPS ? sums[at.lane] : 0;
  int start = __reduce_add_sync(kAllLanes, at.lane < at.warp ? warps : 0) + through - own;
  for (int e = begin; e < end; ++e) {
    first[e] += start;
    start += total[e];
  }
  return __reduce_add_sync(kAllLanes, warps);
}

template <class C>
__device__ __forceinline__ void place_run(const Dispatch& d, const Place<C>& at, int rows, int* mine,
                                          const int* first) {
  for_each_copy(d, at, [&](int i, int expert) {
    const u32 same = __match_any_sync(kAllLanes, expert), below = same & ((1u << at.lane) - 1);
    const bool known = d.has(expert);
    const int before = known ? mine[expert] : 0;
    __syncwarp();
    if (known && below == 0) mine[expert] = before + __popc(same);
    __syncwarp();
    if (i >= at.end) return;
    int row = rows;
    if (known) {
      const int rank = first[expert] + before + __popc(below);
      if constexpr (!C::CAPACITY)
        row = rank;
      else if (rank < d.capacity)
        row = expert * d.capacity + rank;
    }
    d.position[i] = row;
    if (row < rows) hold<C>(d, row, i);
  });
}

// Rows without a copy: those behind the last, or of each expert those that it did not need.
template <class C>
__device__ __forceinline__ void fill_rest(const Dispatch& d, const Place<C>& at, int rows, int filled,
                                          const int* total) {
  const int step = at.threads_of_grid();
  if constexpr (!C::CAPACITY) {
    for (int row = filled + at.thread_of_grid(); row < rows; row += step) hold<C>(d, row, d.copies);
  } else {
    for (int row = at.thread_of_grid(); row < rows; row += step) {
      const int expert = row / d.capacity;
      if (row - expert * d.capacity >= total[expert]) hold<C>(d, row, d.copies);
    }
  }
}

template <class C>
__device__ __forceinline__ void meet(const Dispatch& d) {
  if constexpr (C::MEETING == Meeting::kCluster) {
    __syncwarp();  // the barrier's instruction is for all lanes together
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else if constexpr (C::MEETING == Meeting::kGrid) {
    ptx::meet_all_blocks(d.arrived);
  }
}

template <DispatchConfig C>
__device__ __forceinline__ void dispatch(const Dispatch& d) {
  if constexpr (C::OF_ROWS) ptx::let_next_kernel_start();
  int* counts = ptx::shared_words();
  const Place<C> at(d.copies);
  int* mine = counts + at.warp * d.experts;
  int* first = counts + C::WARPS * d.experts;
  int* total = first + d.experts;
  int* sums = total + d.experts;

  count_run(d, at, mine);
  __syncthreads();
  sum_warps<C>(counts, d.experts, [&](int expert, int count) {
    if constexpr (C::MEETING == Meeting::kAlone)
      total[expert] = count, first[expert] = 0;
    else
      ptx::store_shared_by_blocks(d.blocks + expert * static_cast<int>(gridDim.x) + blockIdx.x, count);
  });
  meet<C>(d);
  if constexpr (C::MEETING != Meeting::kAlone) sum_blocks(d, at, first, total);
  __syncthreads();

  int filled = 0;
  if constexpr (!C::CAPACITY) {
    filled = scan_experts(at, d.experts, first, total, sums);
    __syncthreads();
  }
  const int rows = C::CAPACITY ? d.experts * d.capacity : d.copies;
  if (blockIdx.x == 0) {
    for (int e = static_cast<int>(threadIdx.x); e < d.experts; e += Place<C>::THREADS)
      d.sizes[e] = C::CAPACITY ? min(total[e], d.capacity) : total[e];
  }
  place_run(d, at, rows, mine, first);
  fill_rest(d, at, rows, filled, total);
}

}  // namespace jdg
