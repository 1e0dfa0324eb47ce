// Which rows a block of threads attends for. All blocks count the tiles of all sequences; each begins with
// the one of its own number, and takes a ticket for every further one, so that they end together. Under a
// causal mask the last tiles of a sequence see most keys and come first.
#pragma once

#include <jax_deepgemm/attention/prefill_config.cuh>

namespace jdg {

__device__ __forceinline__ int clamp_to(int v, int low, int high) { return max(low, min(v, high)); }

template <class C>
using Call = PrefillCall<typename C::T>;

// Tiles of a sequence and kv head.
template <class C>
__device__ __forceinline__ int row_tiles(int queries) {
  const int rows = queries * C::GROUP;
  return rows <= C::DECODE_ROWS ? 0 : (rows + kTileRows<C> - 1) / kTileRows<C>;
}

template <class C>
__device__ __forceinline__ int items_of(const Call<C>& p, int sequence) {
  return row_tiles<C>(sequence_of<C::PAGE>(p, sequence).rows) * C::KV_HEADS;
}

// Sequences of a run.
__device__ __forceinline__ int run_length(int seqs) {
  return (seqs + 32 * kTotals - 1) / (32 * kTotals) * 32;
}

// By all warps: the items of each run.
template <class C>
__device__ __forceinline__ void count_items(const Call<C>& p, int* totals) {
  const int warp = warp_index(), lane = threadIdx.x % 32, run = run_length(p.sequences);
#pragma unroll 1
  for (int i = warp; i < kTotals && i * run < p.sequences; i += kPrefillWarps<C>) {
    const int end = min((i + 1) * run, p.sequences);
    int sum = 0;
    for (int s = i * run + lane; s < end; s += 32) sum += items_of<C>(p, s);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, step);
    if (lane == 0) totals[i] = sum;
  }
}

// A warp that looks for items, each further on than the one before. Their order does not change what they
// are.
template <class C>
struct Walk {
  const Call<C>& p;
  const int* totals;
  const int lane, run;
  int ticket;             // of the next item: its number, less the blocks' first ones
  int at = 0;             // of 32 sequences the first
  int group = 0;          // their run
  int before = 0, after;  // items before these sequences, and up to the end of the run
  int sequence = 0;       // of the item found

  __device__ __forceinline__ Walk(const Call<C>& p, const int* totals)
      : p(p),
        totals(totals),
        lane(threadIdx.x % 32),
        run(run_length(p.sequences)),
        ticket(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)),
        after(totals[0]) {}

  // Nobody looks at it before `next`, so that nothing waits for it.
  __device__ __forceinline__ void take_ticket() {
    if (lane == 0) ticket = atomicAdd(p.tickets, 1);
  }

  __device__ __forceinline__ Item next() {
    const int wanted = __shfl_sync(0xFFFFFFFF, ticket, 0) + static_cast<int>(gridDim.x);
    constexpr Item kNone = {0, 0, 0, -1, 0, 0, 0, 0};
#pragma unroll 1
    while (wanted >= after) {
      ++group;
      at = group * run;
      before = after;
      if (group >= kTotals || at >= p.sequences) return kNone;
      after += totals[group];
    }
#pragma unroll 1
    for (;; at += 32) {
      const int mine = at + lane < min((group + 1) * run, p.sequences) ? items_of<C>(p, at + lane) : 0;
      int up_to = mine;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(0xFFFFFFFF, up_to, step);
        if (lane >= step) up_to += below;
      }
      const int further = wanted - before - (up_to - mine), all = __shfl_sync(0xFFFFFFFF, up_to, 31);
      if (wanted - before < all) {
        const int found = __reduce_max_sync(0xFFFFFFFF, further >= 0 && further < mine ? lane : 0);
        sequence = at + found;
        return item(__shfl_sync(0xFFFFFFFF, further, found));
      }
      before += all;
    }
  }

  __device__ __forceinline__ Item item(int index) const {
    const Sequence s = sequence_of<C::PAGE>(p, sequence);
    Item o;
    o.token = s.first, o.rows = s.rows * C::GROUP, o.keys = s.keys;
    o.row = (row_tiles<C>(s.rows) - 1 - index / C::KV_HEADS) * kTileRows<C>;
    o.head = index % C::KV_HEADS;
    o.position = s.start;
    const int last = o.position + (min(o.row + kTileRows<C>, o.rows) - 1) / C::GROUP;
    const int first = o.position + o.row / C::GROUP;
    const int seen = C::CAUSAL ? min(s.keys, last + 1) : s.keys;
    o.begin = C::WINDOW ? max(first - p.window + 1, 0) / C::KEYS : 0;
    o.end = seen > 0 ? (seen + C::KEYS - 1) / C::KEYS : 0;
    return o;
  }
};

}  // namespace jdg
