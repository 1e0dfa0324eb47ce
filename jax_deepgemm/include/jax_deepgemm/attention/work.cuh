// Who computes what: the work of a launch in rounds of keys, cut evenly over its blocks.
//
//   unit      a sequence, ROWS packed rows of it (row = token x head of a group), a head of the cache
//   round     KEYS keys of each warp of a block
//   weight    what is dealt out: a round, or (SPLIT) a part of a unit of `split` rounds
//   piece     what a block does of a unit without a break: any number of rounds, or one part
//
// Units lie one behind the other: sequences, their blocks of rows, heads; each has as many weights as the
// keys that its sequence sees make. Blocks have equal shares of weights, one behind the other. A unit of
// several pieces is summed up by merge.cuh, in their order, so results depend on the batch alone; with SPLIT,
// on the sequence alone.
#pragma once

#include <jax_deepgemm/attention/problem.cuh>

namespace jdg {

// The part of the configuration that says how work is cut.
template <class Config>
struct Cutting {
  static constexpr int kRound = Config::KEYS * Config::WARPS;

  int split;      // rounds of a part; 0: pieces end where blocks' shares do
  int most_rows;  // tokens: sequences of more are another kernel's
  int most_all;   // weights of all sequences, for which there are slots

  // The first key that a token of the sequence sees, on the border of 16.
  __device__ __forceinline__ static int begin(const Sequence& s, int window) {
    return window > 0 ? max(0, s.position(0) - window + 1) & ~15 : 0;
  }
  __device__ __forceinline__ static int rounds(const Sequence& s, int window) {
    return max(1, ceil_div(s.keys - begin(s, window), kRound));
  }
  __device__ __forceinline__ int weights(const Sequence& s, int window) const {
    const int all = rounds(s, window);
    return split > 0 ? ceil_div(all, split) : all;
  }
  __device__ __forceinline__ static int units(const Sequence& s, int kv_heads) {
    return ceil_div(s.rows * Config::GROUP, Config::ROWS) * kv_heads;
  }
  // Of a sequence; 0 of those that are not this kernel's.
  __device__ __forceinline__ int all_weights(const Sequence& s, int window, int kv_heads) const {
    return s.rows > most_rows ? 0 : units(s, kv_heads) * weights(s, window);
  }
  // Of all sequences. Where starts descend, which breaks the rule, sequences share rows and have more
  // weights; those are left out.
  __device__ __forceinline__ int dealt(int all) const { return min(all, most_all); }
};

// Weights in shares that differ by one at most, the larger ones first; each has one at least.
struct Shares {
  int count, least, larger;

  __device__ __forceinline__ Shares(int weights, int blocks)
      : count(min(weights, blocks)), least(weights / max(count, 1)), larger(weights - least * count) {}

  __device__ __forceinline__ int begin(int share) const { return share * least + min(share, larger); }

  // That has this weight.
  __device__ __forceinline__ int of(int weight) const {
    const int in_larger = larger * (least + 1);
    return weight < in_larger ? weight / (least + 1) : larger + (weight - in_larger) / least;
  }
};

// Where a piece's sums go: a block has two pieces of units that are not all its own at most, one at the
// beginning of its share, one at its end.
__device__ __forceinline__ int slot_of(int block, bool is_first) { return 2 * block + (is_first ? 0 : 1); }

// Of numbers that are not negative, 2^31 - 1 at most.
__device__ __forceinline__ int held_sum(int a, int b) {
  const u32 sum = static_cast<u32>(a) + static_cast<u32>(b);
  return sum > 0x7FFFFFFFu ? 0x7FFFFFFF : static_cast<int>(sum);
}

// Sums before each of `count` numbers, number(i), held to 2^31 - 1, to prefix[0 .. count], in front of which
// are WARPS words for itself; by a whole block of WARPS warps. Returns when all threads may read them.
template <int WARPS, class Number>
__device__ __forceinline__ void prefix_sums(int* prefix, int count, Number number) {
  int* of_warps = prefix - WARPS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0;
  for (int base = 0; base < count; base += WARPS * 32) {
    const int i = base + threadIdx.x;
    int sum = i < count ? number(i) : 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFF, sum, step);
      sum = held_sum(sum, lane >= step ? other : 0);
    }
    if (lane == 31) of_warps[warp] = sum;
    __syncthreads();
    int all = before;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      if (w == warp) before = all;
      all = held_sum(all, of_warps[w]);
    }
    if (i < count) prefix[i + 1] = held_sum(before, sum);
    before = all;
    __syncthreads();
  }
  if (threadIdx.x == 0) prefix[0] = 0;
  __syncthreads();
}

// The last i below count with prefix[i] <= at, of ascending numbers: whose stretch has `at`.
__device__ __forceinline__ int stretch_of(const int* prefix, int count, int at) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (prefix[middle] <= at ? low : high) = middle;
  }
  return low;
}

}  // namespace jdg
