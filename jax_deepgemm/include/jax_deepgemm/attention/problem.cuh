// What attention over a paged cache is asked: operands, and the extents of sequences in them, which are
// numbers of the device and are clipped to what the operands hold.
#pragma once

#include <jax_deepgemm/ptx/types.cuh>

namespace jdg {

// One call. Counts and strides are of elements; `scale` and `softcap` stand before log2(e) is multiplied in.
template <class T>
struct AttentionCall {
  const T* q;            // [tokens, heads, D]
  const char* k;         // [layers, pages, kv_heads, PAGE, D]
  const char* v;         // [layers, pages, kv_heads, PAGE, DV]
  const float* k_scale;  // [layers, kv_heads], of an FP8 cache
  const float* v_scale;
  const int* tables;   // [sequences, table_pages]
  const int* starts;   // [sequences + 1]: rows of q
  const int* lengths;  // [sequences]: keys
  const int* layer;    // [1]
  const float* sinks;  // [heads]
  const float* slopes;
  T* out;      // [tokens, heads, DV]
  float* lse;  // [tokens, heads]
  int tokens, sequences, table_pages, pages, layers, kv_heads;
  int most_rows;  // of a sequence; rows beyond are zeros
  float scale, softcap;
  int window;  // 0: none
};

struct Sequence {
  int first;  // row of q
  int rows;   // tokens of q that are looked at
  int keys;
  int start;  // position of its first token

  // Of its token `i`.
  __device__ __forceinline__ int position(int i) const { return start + i; }
};

template <int PAGE, class T>
__device__ __forceinline__ Sequence sequence_of(const AttentionCall<T>& call, int s) {
  const int most = call.table_pages * PAGE;
  const int from = max(0, min(call.starts[s], call.tokens));
  const int to = max(0, min(call.starts[s + 1], call.tokens));
  const int rows = max(0, to - from), keys = max(0, min(call.lengths[s], most));
  return {from, min(rows, call.most_rows), keys, keys - rows};
}

}  // namespace jdg
