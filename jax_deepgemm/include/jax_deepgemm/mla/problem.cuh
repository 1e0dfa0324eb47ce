// What latent attention is asked: queries of many heads by keys that all of them share, of which the first DV
// numbers are the value. Keys lie in pages that a table of each sequence names (paged), or in slots that each
// token names one by one (sparse). Runtime data is clipped to what the operands hold.
#pragma once

#include <jax_deepgemm/attention/work.cuh>

namespace jdg {

// clang-format off
template <class C>
concept MlaConfig = requires {
  typename C::T;           // of queries, keys and the result: bf16 or f16
  typename C::Scores;      // wgmma of width 32: queries by keys
  typename C::HeldScores;  // the same with queries in registers
  typename C::LeftSums;    // wgmma of width LEFT: weights in registers by values, MN-major
  typename C::RightSums;   // of width (DV - LEFT) / RIGHT_PARTS: weights in shared memory by values, MN-major
  C::F16;                  // bool: T is f16
  C::D, C::DV;             // numbers of a key, a multiple of 64; of a value, the first of them, of 128
  C::LEFT, C::RIGHT_PARTS;  // columns of values that the scorer adds up; instructions for the other ones
  C::HELD;                 // of D / 16 steps, those of which the scorer has the queries in registers
  C::PAGE;                 // keys of a page
  C::TEAM;                 // blocks that attend to the same keys at the same time, with 64 rows each
  C::CAUSAL, C::SPARSE;    // bool: whether tokens see no later keys; whether they name their keys
  C::SHARED_BYTES;         // what the host reserves, but for prefix sums
};
// clang-format on

constexpr int kTileKeys = 32, kTileSlots = 4;  // a slot for each warp of loaders

// One call. Counts and strides are of elements.
template <class T>
struct MlaCall {
  const T* q;          // [tokens, heads, D]
  const T* cache;      // [layers, pages, PAGE, D]
  const int* tables;   // [sequences, columns]: pages; sparse: slots, a row for each token
  const int* starts;   // [sequences + 1]: rows of q; sparse: unread
  const int* lengths;  // [sequences]: keys; sparse: unread
  const int* layer;    // [1]
  T* out;              // [tokens, heads, DV]
  float* lse;          // [tokens, heads]
  int tokens, heads, sequences, columns, pages, layers;
  int most_rows;  // tokens of a sequence; those beyond are zeros
  float scale;    // of scores
};

template <class C>
__device__ __forceinline__ Sequence mla_sequence(const MlaCall<typename C::T>& call, int s) {
  if constexpr (C::SPARSE) return {s, 1, call.columns, call.columns - 1};
  const int from = max(0, min(call.starts[s], call.tokens));
  const int to = max(0, min(call.starts[s + 1], call.tokens));
  const int rows = max(0, to - from), keys = max(0, min(call.lengths[s], call.columns * C::PAGE));
  return {from, min(rows, call.most_rows), keys, keys - rows};
}

// How work is cut: units of TEAM x 64 packed rows (token x head) of a sequence, each of as many weights as
// its sequence has tiles of keys, or parts of `split` tiles. Teams of blocks have equal shares.
template <class C>
struct MlaCutting {
  static constexpr int kRows = C::TEAM * 64;

  int split;
  int most_all;  // weights of all sequences, for which there are slots

  __device__ __forceinline__ static int tiles(const Sequence& s) {
    return max(1, ceil_div(s.keys, kTileKeys));
  }
  // Tiles of a weight.
  __device__ __forceinline__ int step() const { return split > 0 ? split : 1; }
  __device__ __forceinline__ int weights(const Sequence& s) const { return ceil_div(tiles(s), step()); }
  __device__ __forceinline__ static int units(const Sequence& s, int heads) {
    return ceil_div(s.rows * heads, kRows);
  }
  __device__ __forceinline__ int all_weights(const Sequence& s, int heads) const {
    return units(s, heads) * weights(s);
  }
};

// Where the weights of sequences begin. `prefix` has their sums, with a word for each of WARPS warps in
// front; tokens that name their keys all have the same.
template <class C, int WARPS>
struct MlaBatch {
  const MlaCall<typename C::T>& call;
  const MlaCutting<C>& cutting;
  int* prefix;

  // By the whole block; returns when all threads may read.
  __device__ __forceinline__ void count() const {
    if constexpr (C::SPARSE) return;
    prefix_sums<WARPS>(prefix, call.sequences,
                       [&](int s) { return cutting.all_weights(mla_sequence<C>(call, s), call.heads); });
  }
  __device__ __forceinline__ int each() const {
    return cutting.all_weights(mla_sequence<C>(call, 0), call.heads);
  }
  __device__ __forceinline__ int before(int s) const { return C::SPARSE ? s * each() : prefix[s]; }
  // Where starts descend, which breaks the rule, sequences share rows and have more; those are left out.
  __device__ __forceinline__ int all() const { return min(before(call.sequences), cutting.most_all); }
  // The sequence that has a weight.
  __device__ __forceinline__ int of(int weight) const {
    return C::SPARSE ? weight / each() : stretch_of(prefix, call.sequences, weight);
  }
};

}  // namespace jdg
