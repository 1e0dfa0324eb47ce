// The TOP_K experts of every token and their weights, of logits [tokens, EXPERTS].
//
// clang-format off
//   logits --registers, VALUES neighbours a lane--> scores --+ bias--> keys: integers of the scores' order
//   groups     the best two of each count; keys of experts in the others become 0, which is never chosen
//   threshold  the TOP_K-th of the lanes' best keys: at least TOP_K keys are not below it, and hardly more
//   candidates those, in shared memory, as key | ~id; a lane for each counts how many are better
//   rounds     where there are more than 32 of them (equal scores, sorted ones): TOP_K times the best lane
//              gives its best
//   lane i     takes the i-th expert: reads its logit again; score, sum, weight
// clang-format on
//
// A warp per token, or where a lane per expert is enough, as many lanes as there are experts; lanes are in
// the order of ids, so that among equals the first lane has the lowest. Four warps per block, which share
// nothing. Each reads its logits at once and they hide each other's latency.
//
//   shared memory of a token:  all[LANES] candidates | order[LANES] ids
//
// Hazard: lanes behind the last token compute it once more, as shuffles want every lane; they store nothing.
#pragma once

#include <jax_deepgemm/route/scores.cuh>

namespace jdg {

// What a kernel is told of a router; ops/route/sm90.py writes it.
// clang-format off
template <class C>
concept RouteConfig = requires {
  typename C::In;   // dtype of the logits
  C::SCORE;         // Score: what the logits become
  C::EXPERTS;       // columns of the logits
  C::TOP_K;         // experts that are chosen
  C::GROUPS;        // equal runs of experts; 1: the choice is free
  C::TOP_GROUPS;    // groups that experts are chosen of
  C::LANES;         // lanes of a token, a power of two
  C::PARTS;         // lanes of a group, a power of two
  C::VALUES;        // experts of a lane; 1 where LANES < 32
  C::VECTOR;        // logits that are read at once
  C::VECTOR_BIAS;   // numbers of the bias that are
  C::BIASED;        // bool: whether there is a bias
  C::RENORMALIZE;   // bool: whether weights are divided by their sum
};
// clang-format on

constexpr int kRouteThreads = 128;

// Which experts a lane has: neighbours, of one group.
template <RouteConfig C>
struct Lane {
  static constexpr int kSize = C::EXPERTS / C::GROUPS;
  static constexpr bool kFull = C::PARTS * C::VALUES == kSize && C::GROUPS * C::PARTS == C::LANES;
  int index, group, first, count;

  __device__ __forceinline__ explicit Lane(int i) : index(i), group(i / C::PARTS) {
    const int start = i % C::PARTS * C::VALUES;
    first = group * kSize + start;
    count = group < C::GROUPS ? kSize - start : 0;
  }
  __device__ __forceinline__ bool has(int i) const { return kFull || i < count; }

  // Its numbers of a row, and `other` where it has no expert.
  template <int VECTOR, class T>
  __device__ __forceinline__ void load(const T* row, float (&to)[C::VALUES], float other) const {
#pragma unroll
    for (int i = 0; i < C::VALUES; i += VECTOR) {
      if (has(i)) {
        const Run<T, VECTOR> run = *reinterpret_cast<const Run<T, VECTOR>*>(row + first + i);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) to[i + j] = ptx::to_float(run.v[j]);
      } else {
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) to[i + j] = other;
      }
    }
  }
};

// Keys ---------------------------------------------------------------------------------------------------

constexpr float kLowest = -0x1.fffffcp+127f;  // NaN and -infinity rank as this, the last but one float

__device__ __forceinline__ u32 higher(u32 a, u32 b) { return a > b ? a : b; }
__device__ __forceinline__ u32 lower(u32 a, u32 b) { return a < b ? a : b; }

// An integer above 0, of the order of floats; -0 is 0.
__device__ __forceinline__ u32 key_of(float rank) {
  const u32 bits = __float_as_uint(fmaxf(rank, kLowest) + 0.0f);
  return bits ^ (static_cast<u32>(static_cast<int>(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float rank_of(u32 key) {
  return __uint_as_float(key ^ (static_cast<int>(key) < 0 ? 0x80000000u : 0xFFFFFFFFu));
}

// Zeroes the keys of a lane whose group is none of the best ones: those whose best two experts are best
// together, of equal ones the first. Halves, as the sum of two is then finite.
template <RouteConfig C>
__device__ __forceinline__ void close_groups(u32 (&keys)[C::VALUES], const Lane<C>& lane) {
  u32 best = 0, second = 0;
#pragma unroll
  for (int i = 0; i < C::VALUES; ++i) {
    second = higher(second, lower(best, keys[i]));
    best = higher(best, keys[i]);
  }
#pragma unroll
  for (int step = 1; step < C::PARTS; step *= 2) {
    const u32 other = __shfl_xor_sync(kEveryLane, best, step);
    second = higher(higher(second, __shfl_xor_sync(kEveryLane, second, step)), lower(best, other));
    best = higher(best, other);
  }
  const float power = 0.5f * rank_of(best) + (Lane<C>::kSize > 1 ? 0.5f * rank_of(second) : 0.0f);
  int better = 0;
#pragma unroll
  for (int group = 0; group < C::GROUPS; ++group) {
    const float other = __shfl_sync(kEveryLane, power, group * C::PARTS, C::LANES);
    better += other > power || (other == power && group < lane.group);
  }
#pragma unroll
  for (int i = 0; i < C::VALUES; ++i) keys[i] = better < C::TOP_GROUPS ? keys[i] : 0;
}

// Choosing -----------------------------------------------------------------------------------------------

template <RouteConfig C>
struct Chosen {
  u64 all[C::LANES];
  int order[C::LANES];
};

// Larger for a larger key, and among equal ones for a lower id.
__device__ __forceinline__ u64 candidate(u32 key, int id) {
  return static_cast<u64>(key) << 32 | ~static_cast<u32>(id);
}

// A lane's candidate to its place among `count` of them; behind those are zeros.
template <RouteConfig C>
__device__ __forceinline__ void place(Chosen<C>& chosen, const Lane<C>& lane, int count) {
  constexpr int kStep = smaller(C::LANES, 4);
  __syncwarp();
  const u64 mine = chosen.all[lane.index];
  int better = 0;
#pragma unroll 1
  for (int i = 0; i < count; i += kStep) {
#pragma unroll
    for (int j = 0; j < kStep; ++j) better += chosen.all[i + j] > mine;
  }
  if (lane.index < count && better < C::TOP_K)
    chosen.order[better] = static_cast<int>(~static_cast<u32>(mine));
  __syncwarp();
}

// A key that at least TOP_K keys are not below: the TOP_K-th of the lanes' best ones, or 1. Lanes with equal
// ones leave together, which can only make it lower.
template <RouteConfig C>
__device__ __forceinline__ u32 threshold(u32 best) {
  u32 found = 0;
#pragma unroll
  for (int i = 0; i < C::TOP_K; ++i) {
    found = ptx::reduce_max(best);
    best = best == found ? 0 : best;
  }
  return higher(found, 1);
}

// TOP_K times, the first lane of those with the best key gives its first expert that has it.
template <RouteConfig C>
__device__ __forceinline__ void in_rounds(Chosen<C>& chosen, u32 (&keys)[C::VALUES], const Lane<C>& lane,
                                          u32 best) {
#pragma unroll 1
  for (int i = 0; i < C::TOP_K; ++i) {
    const u32 found = ptx::reduce_max(best);
    if (lane.index == __ffs(__ballot_sync(kEveryLane, best == found)) - 1) {
      int id = C::VALUES;
      best = 0;
#pragma unroll
      for (int j = 0; j < C::VALUES; ++j) {
        const bool taken = id == C::VALUES && keys[j] == found;
        id = taken ? j : id;
        keys[j] = taken ? 0 : keys[j];
        best = higher(best, keys[j]);
      }
      chosen.order[i] = lane.first + id;
    }
    __syncwarp();
  }
}

// Fills order[0 .. TOP_K - 1]. TOP_K of all keys are not 0.
template <RouteConfig C>
__device__ __forceinline__ void choose(Chosen<C>& chosen, u32 (&keys)[C::VALUES], const Lane<C>& lane) {
  if constexpr (C::VALUES == 1) {
    chosen.all[lane.index] = candidate(keys[0], lane.first);
    place(chosen, lane, C::LANES);
  } else {
    static_assert(C::LANES == 32);
    chosen.all[lane.index] = 0;
    u32 best = keys[0];
#pragma unroll
    for (int i = 1; i < C::VALUES; ++i) best = higher(best, keys[i]);
    const u32 least = threshold<C>(best);
    int mine = 0;
#pragma unroll
    for (int i = 0; i < C::VALUES; ++i) mine += keys[i] >= least;
    int end = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(kEveryLane, end, step);
      end += lane.index >= step ? before : 0;
    }
    const int count = __shfl_sync(kEveryLane, end, 31);
    if (count > 32) return in_rounds(chosen, keys, lane, best);
    __syncwarp();
    u64* to = chosen.all + end - mine;
#pragma unroll
    for (int i = 0; i < C::VALUES; ++i)
      if (keys[i] >= least) *to++ = candidate(keys[i], lane.first + i);
    place(chosen, lane, count);
  }
}

template <RouteConfig C>
__device__ __forceinline__ void route(const typename C::In* logits, const float* bias, int* ids,
                                      float* weights, int tokens, float scale) {
  __shared__ Chosen<C> shared[kRouteThreads / C::LANES];
  const Lane<C> lane(threadIdx.x % C::LANES);
  Chosen<C>& chosen = shared[threadIdx.x / C::LANES];
  const int mine = blockIdx.x * (kRouteThreads / C::LANES) + threadIdx.x / C::LANES;
  const i64 token = min(mine, tokens - 1);
  const typename C::In* row = logits + token * C::EXPERTS;

  float x[C::VALUES];
  u32 keys[C::VALUES];
  lane.template load<C::VECTOR>(row, x, -kInfinity);
  Softmax softmax;
  if constexpr (C::SCORE == Score::kSoftmax) softmax = Softmax::of<C::LANES>(x);
#pragma unroll
  for (int i = 0; i < C::VALUES; ++i) x[i] = score_of<C::SCORE>(x[i], softmax);
  if constexpr (C::BIASED) {
    float added[C::VALUES];
    lane.template load<C::VECTOR_BIAS>(bias, added, 0.0f);
#pragma unroll
    for (int i = 0; i < C::VALUES; ++i) x[i] += added[i];
  }
#pragma unroll
  for (int i = 0; i < C::VALUES; ++i) keys[i] = lane.has(i) ? key_of(x[i]) : 0;
  if constexpr (C::GROUPS > 1) close_groups(keys, lane);
  choose(chosen, keys, lane);

  const bool one = lane.index < C::TOP_K;
  const int id = one ? chosen.order[lane.index] : 0;
  float weight = one ? score_of<C::SCORE>(ptx::to_float(row[id]), softmax) : 0.0f;
  if constexpr (C::RENORMALIZE) weight /= sum_of_lanes<C::LANES>(weight) + kTiny;
  if (one && mine < tokens) {
    ids[token * C::TOP_K + lane.index] = id;
    weights[token * C::TOP_K + lane.index] = weight * scale;
  }
}

}  // namespace jdg
