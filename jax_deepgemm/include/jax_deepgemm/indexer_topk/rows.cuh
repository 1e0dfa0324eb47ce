// What lies between the scores of a token and the choice from them, where scores are filtered as they are
// made (indexer/candidates.cuh). A block of threads has a token.
//
// clang-format off
//   in_order    candidates of a token, as warps wrote them -> the same by ascending keys, and how many there
//               are. Where they are not whole, or too few, none, and the token is listed
//   keys_of     columns of those that were chosen -> their keys
//   gathered    operands of some listed tokens, one behind the other; windows of nothing behind the last
//   scattered   what was chosen for those, to their rows
// clang-format on
//
// Of equal numbers the choice takes the lower column, which therefore must be the lower key: in_order sets a
// bit for each key, and counts the bits before it. Tokens are listed in any order, which changes no result.
//
// shared memory of in_order:  numbers[8 places] | keys[8 places] | bits[keys / 32] | before[bits / 8] |
// sums[32]
//
// Hazard: in_order writes where it has read; between the two all threads meet.
#pragma once

#include <jax_deepgemm/ptx/barrier.cuh>
#include <jax_deepgemm/ptx/grid.cuh>

namespace jdg {

constexpr int kRowThreads = 256, kRowSegments = 8, kGroup = 8;
constexpr float kLeastBound = -0x1.fffffep+127f;

// Candidates of all tokens.
struct Filtered {
  const float* bounds;  // token i's at (i + 1) * pitch - 1
  float* numbers;
  int* keys;
  const int* counts;  // [token][front, back, neither][segment]
  int pitch, places;
};

// Tokens that have too few candidates, or too many.
struct Listed {
  int* tokens;
  int* count;
};

// Of a token: where a warp's segment begins in the list of all, and what it has.
struct Place {
  int begin, front, back, total;
  bool whole;
};

__device__ __forceinline__ Place place_of(const Filtered& f, int token, int warp, int wanted) {
  const int* const counts = f.counts + static_cast<i64>(token) * 3 * kRowSegments;
  Place p{0, 0, 0, 0, true};
#pragma unroll
  for (int i = 0; i < kRowSegments; ++i) {
    const int front = counts[i], back = counts[kRowSegments + i];
    if (i == warp) p.begin = p.total, p.front = front, p.back = back;
    p.total += front + back;
    p.whole = p.whole && front + back <= f.places && counts[2 * kRowSegments + i] == 0;
  }
  const bool bounded = f.bounds[static_cast<i64>(token + 1) * f.pitch - 1] > kLeastBound;
  p.whole = p.whole && (p.total >= wanted || !bounded);
  return p;
}

// before[g]: how many bits are set in groups of words before the g-th.
__device__ __forceinline__ void count_before(const u32* bits, int words, int* before, int* sums) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int groups = ceil_div(words, kGroup), each = ceil_div(groups, kRowThreads);
  const int first = min(thread * each, groups), last = min(first + each, groups);
  int own = 0;
  for (int g = first; g < last; ++g) {
    before[g] = own;
    for (int w = g * kGroup; w < min((g + 1) * kGroup, words); ++w) own += __popc(bits[w]);
  }
  int through = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(0xFFFFFFFF, through, step);
    if (lane >= step) through += below;
  }
  if (lane == 31) sums[warp] = through;
  __syncthreads();
  int ahead = through - own;
  for (int i = 0; i < warp; ++i) ahead += sums[i];
  for (int g = first; g < last; ++g) before[g] += ahead;
  __syncthreads();
}

__device__ __forceinline__ void in_order(const Filtered& f, int num_keys, int wanted, int* ends,
                                         const Listed& listed) {
  const int token = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32, warp = thread / 32, words = ceil_div(num_keys, 32);
  const Place place = place_of(f, token, warp, wanted);
  if (thread == 0) {
    ends[token] = place.whole ? place.total : 0;
    if (!place.whole) listed.tokens[atomicAdd(listed.count, 1)] = token;
  }
  if (!place.whole) return;

  const int most = kRowSegments * f.places;
  int* const numbers = ptx::shared_words();
  int* const keys = numbers + most;
  u32* const bits = reinterpret_cast<u32*>(keys + most);
  int* const before = reinterpret_cast<int*>(bits + words);
  int* const sums = before + ceil_div(words, kGroup);
  for (int i = thread; i < words; i += kRowThreads) bits[i] = 0;
  __syncthreads();

  const i64 row = static_cast<i64>(token) * most, segment = row + warp * f.places;
  for (int i = lane; i < place.front + place.back; i += 32) {
    const i64 from = segment + (i < place.front ? i : f.places - 1 - (i - place.front));
    const int key = f.keys[from];
    numbers[place.begin + i] = static_cast<int>(__float_as_uint(f.numbers[from]));
    keys[place.begin + i] = key;
    atomicOr(bits + key / 32, 1u << key % 32);
  }
  __syncthreads();
  count_before(bits, words, before, sums);

  for (int i = thread; i < place.total; i += kRowThreads) {
    const int key = keys[i], word = key / 32;
    int to = before[word / kGroup] + __popc(bits[word] & ((1u << key % 32) - 1));
    for (int w = word / kGroup * kGroup; w < word; ++w) to += __popc(bits[w]);
    f.numbers[row + to] = __uint_as_float(static_cast<u32>(numbers[i]));
    f.keys[row + to] = key;
  }
}

__device__ __forceinline__ void keys_of(const int* keys, int most, int* chosen, int k) {
  const i64 token = blockIdx.x;
  for (int i = static_cast<int>(threadIdx.x); i < k; i += kRowThreads) {
    int* const at = chosen + token * k + i;
    if (*at >= 0) *at = keys[token * most + *at];
  }
}

// Operands of tokens: queries and weights in pieces of 16 bytes, so many of each token, and windows.
template <class Vector, class Integer>
struct Operands {
  Vector *queries, *weights;
  Integer *starts, *ends;
};

__device__ __forceinline__ void copy(const uint4* from, uint4* to, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kRowThreads) to[i] = from[i];
}

// Listed tokens from `first` on.
__device__ __forceinline__ void gathered(const Operands<const uint4, const int>& from,
                                         const Operands<uint4, int>& to, int queries, int weights,
                                         const Listed& listed, int first) {
  const int slot = static_cast<int>(blockIdx.x);
  const bool some = first + slot < *listed.count;
  const i64 token = some ? listed.tokens[first + slot] : 0;
  if (threadIdx.x == 0) {
    to.starts[slot] = some ? from.starts[token] : 0;
    to.ends[slot] = some ? from.ends[token] : 0;
  }
  if (!some) return;
  copy(from.queries + token * queries, to.queries + static_cast<i64>(slot) * queries, queries);
  copy(from.weights + token * weights, to.weights + static_cast<i64>(slot) * weights, weights);
}

__device__ __forceinline__ void scattered(const float* scores, const int* keys, float* to_scores,
                                          int* to_keys, int k, const Listed& listed, int first) {
  const i64 slot = blockIdx.x;
  if (first + slot >= *listed.count) return;
  const i64 token = listed.tokens[first + slot];
  for (int i = static_cast<int>(threadIdx.x); i < k; i += kRowThreads) {
    to_scores[token * k + i] = scores[slot * k + i];
    to_keys[token * k + i] = keys[slot * k + i];
  }
}

}  // namespace jdg
