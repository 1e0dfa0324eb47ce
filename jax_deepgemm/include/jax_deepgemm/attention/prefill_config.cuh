// What the prefill kernel is told at compile time: every field of its configuration, which
// ops/attention/sm90/prefill.py writes as `struct Config`, and what follows from it.
//
// A sequence's queries are packed: row r of a sequence and kv head is query r / GROUP, head r % GROUP of
// those that share the kv head. A tile is 64 rows of each consumer by KEYS keys.
#pragma once

#include <jax_deepgemm/attention/problem.cuh>
#include <jax_deepgemm/pipeline.cuh>

namespace jdg {

// clang-format off
template <class C>
concept PrefillConfig = requires {
  typename C::T;           // of queries: f16 or bf16
  typename C::Scores;      // wgmma of width KEYS: queries by keys
  typename C::Values;      // wgmma of width FIRST: weights in registers by values, MN-major
  typename C::Rest;        // the same of the other columns of values
  C::KEYS;                 // of a tile, a multiple of 16
  C::DEPTH;                // numbers of a key, a multiple of 16
  C::V_DEPTH;              // of a value
  C::FIRST;                // those of a value that one instruction takes: all, or some slabs
  C::PAGE;                 // keys of a page
  C::KV_HEADS;             // heads of the cache
  C::GROUP;                // heads of queries for each of them
  C::CONSUMERS;            // warpgroups of 64 rows each, 2 or 3
  C::STAGES;               // slots of keys, and of values
  C::PACKED_STAGES;        // slots of either in e4m3; 0: the cache has the queries' type
  C::CAUSAL;               // bool: whether queries see no later keys
  C::WINDOW;               // bool: whether they see a window only
  C::SOFTCAP;              // bool: whether scores are bounded
  C::SLOPES;               // bool: whether they fall with distance
  C::SCALED;               // bool: whether they are multiplied before anything else looks at them
  C::SINKS;                // bool: whether heads have a sink
  C::PING_PONG;            // bool: whether two consumers issue products in turn
  C::DECODE_ROWS;          // sequences with no more packed rows are another kernel's
  C::SHARED_BYTES;         // what the host reserves
};
// clang-format on

constexpr int kSlabBytes = 128, kSlabNumbers = 64, kGroupRows = 8, kGroupBytes = kGroupRows * kSlabBytes;
constexpr int kLoaders = 96, kWideners = 128;  // threads
constexpr int kTotals = 128;                   // runs of sequences whose tiles are counted
template <class C>
constexpr int kTileRows = 64 * C::CONSUMERS;
template <class C>
constexpr bool kPackedCache = C::PACKED_STAGES > 0;
template <class C>
constexpr int kPrefillWarps = 4 * C::CONSUMERS + 4 + 4 * kPackedCache<C>;

// Where the rows of a tile of ROWS by DEPTH numbers lie.
template <int ROWS, int DEPTH>
struct Tile {
  static constexpr int kSlabs = ceil_div(DEPTH, kSlabNumbers);
  static constexpr int kBytes = kSlabs * ROWS * kSlabBytes;
  static constexpr bool kJoined = DEPTH % kSlabNumbers == 0;               // the slabs of a group
  static constexpr int kSlab = kJoined ? kGroupBytes : ROWS * kSlabBytes;  // strides
  static constexpr int kGroup = kJoined ? kSlabs * kGroupBytes : kGroupBytes;

  __device__ __forceinline__ static int row(int row) {
    return row / kGroupRows * kGroup + row % kGroupRows * kSlabBytes;
  }
  // Eight numbers.
  __device__ __forceinline__ static int chunk(int at, int chunk) {
    return row(at) + chunk / 8 * kSlab + (chunk % 8 ^ at % 8) * 16;
  }
};

// Keys of one box: whole tiles and whole pages have whole boxes.
template <class C>
constexpr int kBoxKeys = gcd(C::PAGE, C::KEYS);
template <class C>
constexpr int kBoxes = C::KEYS / kBoxKeys<C>;

// Registers of a thread of the consumers, of the producer's warpgroup, and of the one that widens.
template <class C>
constexpr bool kLarge = C::KEYS * 3 / 4 + C::V_DEPTH / 2 > 160;
template <class C>
constexpr int kMany = C::CONSUMERS == 3 ? 160
                      : kPackedCache<C> ? (kLarge<C> ? 216 : 208)
                      : kLarge<C>       ? 232
                                        : 224;
template <class C>
constexpr int kFew = C::CONSUMERS == 3 ? 32
                     : kLarge<C>       ? 40
                     : kPackedCache<C> ? 48
                                       : 56;
template <class C>
constexpr int kWidenerRegisters = kLarge<C> ? 40 : 48;

// A piece of work: a tile of packed rows of a sequence and a kv head.
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
  using Queries = Tile<kTileRows<C>, C::DEPTH>;
  using Keys = Tile<C::KEYS, C::DEPTH>;
  using Values = Tile<C::KEYS, C::V_DEPTH>;
  static constexpr u32 kKeys = Queries::kBytes;
  static constexpr u32 kValues = kKeys + C::STAGES * Keys::kBytes;
  static constexpr u32 kPacked = kValues + C::STAGES * Values::kBytes;
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

// A call whose keys and values are behind tensor maps; `tickets` is 0 when the kernel begins.
template <class T>
struct PrefillCall : AttentionCall<T> {
  const TensorMap *key_map, *value_map;
  int* tickets;
};

}  // namespace jdg
