// What the prefill kernel is told at compile time: every field of its configuration, which
// ops/attention/sm90/prefill.py writes as `struct Config`, and what follows from it.
//
// A sequence's queries are packed: row r of a sequence and kv head is query r / GROUP, head r % GROUP of
// those that share the kv head. A tile is 128 rows by KEYS keys.
#pragma once

#include <jax_deepgemm/pipeline.cuh>

namespace jdg {

// clang-format off
template <class C>
concept PrefillConfig = requires {
  typename C::Scores;      // wgmma of width KEYS: queries by keys
  typename C::Values;      // wgmma of width V_DEPTH: weights in registers by values, MN-major
  C::HALF;                 // bool: whether numbers are float16, else bfloat16
  C::KEYS;                 // of a tile, a multiple of 16
  C::DEPTH, C::V_DEPTH;    // numbers of a key and of a value, multiples of 16
  C::PAGE;                 // keys of a page
  C::KV_HEADS, C::GROUP;   // heads of keys, and of queries for each
  C::STAGES;               // slots of keys, and of values
  C::PACKED_STAGES;        // slots of either in e4m3; 0: the cache has the queries' type
  C::CAUSAL, C::WINDOW;    // bool: whether queries see no later keys; whether they see a window only
  C::SOFTCAP, C::SLOPES;   // bool: whether scores are bounded; whether they fall with distance
  C::SCALED;               // bool: whether scores are multiplied before anything else looks at them
  C::SINKS;                // bool: whether heads have a sink
  C::PING_PONG;            // bool: whether the two consumers issue products in turn
  C::DECODE_ROWS;          // sequences with no more packed rows are another kernel's
  C::FILL;                 // bool: whether rows of no sequence are written
  C::SHARED_BYTES;         // what the host reserves
};
// clang-format on

constexpr int kTileRows = 128, kSlabBytes = 128, kSlabNumbers = 64;
constexpr int kPrefillThreads = 384, kPrefillWarps = 12, kConsumerWarps = 8, kLoaderThreads = 96;
constexpr int kTotals = 128;  // runs of sequences whose tiles are counted

// Keys of one box: whole tiles and whole pages have whole boxes.
template <class C>
constexpr int kBoxKeys = gcd(C::PAGE, C::KEYS);
template <class C>
constexpr int kBoxes = C::KEYS / kBoxKeys<C>;

// Registers of a thread of the consumers, and of the others.
template <class C>
constexpr bool kLarge = C::KEYS * 3 / 4 + C::V_DEPTH / 2 > 160;
template <class C>
constexpr int kMany = kLarge<C> ? 232 : 224;
template <class C>
constexpr int kFew = kLarge<C> ? 40 : 56;

template <class C>
constexpr bool kPackedCache = C::PACKED_STAGES > 0;

// A piece of work: 128 packed rows of a sequence and a kv head.
struct Item {
  int token, rows;  // the sequence's first token, and its packed rows
  int row;          // the first of the tile
  int head;         // of keys; -1: there is no more work
  int position;     // of the sequence's first query
  int keys;         // of the sequence
  int begin, end;   // tiles of keys that any of the rows sees
};
constexpr int kItemBytes = 32;

// Where things are in shared memory.
template <PrefillConfig C>
struct PrefillLayout {
  static constexpr int kSlabs = ceil_div(C::DEPTH, kSlabNumbers);
  static constexpr int kValueSlabs = ceil_div(C::V_DEPTH, kSlabNumbers);
  static constexpr int kQueryBytes = kSlabs * kTileRows * kSlabBytes;
  static constexpr int kKeyBytes = kSlabs * C::KEYS * kSlabBytes;
  static constexpr int kValueBytes = kValueSlabs * C::KEYS * kSlabBytes;
  static constexpr u32 kKeys = kQueryBytes;
  static constexpr u32 kValues = kKeys + C::STAGES * kKeyBytes;
  static constexpr u32 kPacked = kValues + C::STAGES * kValueBytes;
  static constexpr int kPackedBytes = C::KEYS * (C::DEPTH > C::V_DEPTH ? C::DEPTH : C::V_DEPTH);
  using KeyPipe = Pipeline<C::STAGES, kPacked + C::PACKED_STAGES * kPackedBytes>;
  using ValuePipe = Pipeline<C::STAGES, KeyPipe::kEnd>;
  using QueryPipe = Pipeline<1, ValuePipe::kEnd>;
  using ItemPipe = Pipeline<2, QueryPipe::kEnd>;
  using PackedPipe = Pipeline<C::PACKED_STAGES, ItemPipe::kEnd>;
  static constexpr u32 kItems = PackedPipe::kEnd;
  static constexpr u32 kCounts = kItems + 2 * kItemBytes;
  static constexpr u32 kBytes = kCounts + kTotals * 4;
  static_assert(kBytes <= C::SHARED_BYTES, "the host's arithmetic differs");
};

// What the kernel works on. `scale` multiplies products first; the bound of scores is in units of log2.
// Scales of a cache in e4m3 are of a layer and head.
struct PrefillProblem {
  const void* q;
  const TensorMap *k, *v;
  const float *k_scale, *v_scale;
  const int *tables, *cu_q_lens, *kv_lens, *layer;
  const float *sinks, *slopes;
  void* out;
  float* lse;
  int tokens, seqs, table_pages, pages, layers, window;
  float scale, cap;
};

}  // namespace jdg
