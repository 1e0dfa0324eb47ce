// What an indexer kernel is told at compile time: every field of its configuration, which ops/indexer/sm90.py
// writes as `struct Config`, and what follows from it.
//
// wgmma multiplies keys (its M side, 64 at a time) by columns (its N side): the heads of a few tokens, one
// token behind the other.
#pragma once

#include <jax_deepgemm/pipeline.cuh>

namespace jdg {

// clang-format off
template <class C>
concept LogitsConfig = requires {
  typename C::Mma;         // wgmma of one width, TOKENS * HEADS: Mma::issue, made by jit/wgmma.py
  typename C::Out;         // elements of the result: float or bf16
  C::HEADS;                // of a token, a multiple of 8; those that it does not have are zeros
  C::TOKENS;               // of a bank: as many as are multiplied by one instruction
  C::SLABS;                // pieces of 128 bytes that a key, or a head, has of d
  C::STEPS;                // wgmma instructions along d: 32 bytes each
  C::SCALED;               // bool: whether keys have scales (FP8)
  C::COMPRESSED;           // bool: whether a row's first column is the first key of its window
  C::STAGES;               // slots of the pipeline of keys
  C::QUERY_STAGES;         // slots of the pipeline of tokens
  C::PACKED_STAGES;        // slots of the pipeline of keys in FP4; 0: keys are what is multiplied
  C::PAGE;                 // keys of a page; 0: keys lie one behind the other
  C::TENSOR_SUMS;          // bool: whether products of warps sum over heads (a multiple of 16)
  C::SHARED_BYTES;         // what the host reserves
};
// clang-format on

constexpr int kTileKeys = 128;  // that a block of threads scores at a time: 64 for each consumer warpgroup
constexpr int kConsumers = 2;   // warpgroups
constexpr int kBanks = 2;       // of tokens: one is multiplied while the other is summed up
template <class C>
constexpr bool kPacked = C::PACKED_STAGES > 0;
template <class C>
constexpr int kIndexerThreads = 128 * (kConsumers + 1 + kPacked<C>);
constexpr int kSlabBytes = 128;
template <class C>
constexpr int kSlabElements = C::SCALED ? 128 : 64;  // FP8, or BF16

template <class C>
constexpr int kBankCols = C::TOKENS * C::HEADS;
template <class C>
constexpr int kBlockCols = kBanks * kBankCols<C>;
template <class C>
constexpr int kTilePages = C::PAGE > 0 ? kTileKeys / (C::PAGE > 0 ? C::PAGE : 1) : 1;
template <class C>
constexpr int kBlockTokens = kBanks * C::TOKENS;

// What a block of threads knows of a token.
//
// A row of the result begins with the key `first`; keys from `start` on and before `end` have a score, the
// others before `last` minus infinity. Keys beyond have no column. Element `key` of a row is at `row` + key.
struct Token {
  u64 row;
  int start, end, first, last;
};
constexpr int kTokenBytes = 32;

// The tiles of a block of tokens: the first key, how many (0: there is nothing more to do), and the keys that
// are in the windows of all tokens.
struct Run {
  int key, tiles, begin, end;
};

constexpr u32 kTableBytes = 160;  // of expand.cuh

// Where things are in shared memory.
template <class C>
struct LogitsLayout {
  static constexpr u32 kKeysBytes = C::SLABS * kTileKeys * kSlabBytes;
  static constexpr u32 kQueriesBytes = C::SLABS * kBlockCols<C> * kSlabBytes;
  static constexpr u32 kScalesBytes = C::SCALED ? kTileKeys * 4 : 0;
  static constexpr u32 kPagePitch = C::PAGE * 4 < 128 ? 128 : C::PAGE * 4;  // of a page's scales
  static constexpr u32 kScalesPitch =
      C::PAGE > 0 ? kTileKeys / (C::PAGE > 0 ? C::PAGE : 1) * kPagePitch : kScalesBytes;
  static constexpr u32 kPackedRow = C::STEPS * 16;  // of a key of 32 C::STEPS numbers
  static constexpr u32 kPackedBytes = kPacked<C> ? kTileKeys * kPackedRow : 0;
  static constexpr u32 kWeightsBytes = kBlockCols<C> * 4;
  static constexpr u32 kWeightsPitch = align_up(kWeightsBytes, 128);

  static constexpr u32 kKeys = 0;
  static constexpr u32 kQueries = kKeys + C::STAGES * kKeysBytes;  // 1024-byte aligned
  static constexpr u32 kPackedKeys = kQueries + C::QUERY_STAGES * kQueriesBytes;
  static constexpr u32 kScales = kPackedKeys + C::PACKED_STAGES * kPackedBytes;
  static constexpr u32 kWords = kScales + C::STAGES * kScalesPitch;
  static constexpr u32 kWeights = kWords + C::PACKED_STAGES * kScalesPitch;
  static constexpr u32 kTokens = kWeights + C::QUERY_STAGES * kWeightsPitch;
  static constexpr u32 kRuns = kTokens + C::QUERY_STAGES * kBlockTokens<C> * kTokenBytes;
  static constexpr u32 kKeyPipeline = kRuns + C::QUERY_STAGES * 16;
  static constexpr u32 kQueryPipeline = Pipeline<C::STAGES, kKeyPipeline>::kEnd;
  static constexpr u32 kPackedPipeline = Pipeline<C::QUERY_STAGES, kQueryPipeline>::kEnd;
  static constexpr u32 kTable = Pipeline<C::PACKED_STAGES, kPackedPipeline>::kEnd;
  static constexpr u32 kShare = kTable + (kPacked<C> ? kTableBytes : 0);
  static constexpr u32 kBytes = kShare + kIndexerThreads<C> / 32 * 8 + 16;
  static_assert(kBytes <= C::SHARED_BYTES, "the host computed less shared memory than the kernel uses");
  static_assert(kBankCols<C> % 8 == 0 && kBankCols<C> <= 256, "the widths of wgmma");
};

// Both pipelines as seen from one side of them.
template <class C>
struct Keys : Pipeline<C::STAGES, LogitsLayout<C>::kKeyPipeline> {
  using L = LogitsLayout<C>;
  using Base = Pipeline<C::STAGES, L::kKeyPipeline>;
  using Base::smem, Base::stage;

  __device__ __forceinline__ explicit Keys(u32 base) : Base(base) {}
  __device__ __forceinline__ u32 keys() const { return smem + L::kKeys + stage * L::kKeysBytes; }
  __device__ __forceinline__ u32 scales() const { return smem + L::kScales + stage * L::kScalesPitch; }
};

// Keys in FP4, and words of their scales.
template <class C>
struct PackedKeys : Pipeline<C::PACKED_STAGES, LogitsLayout<C>::kPackedPipeline> {
  using L = LogitsLayout<C>;
  using Base = Pipeline<C::PACKED_STAGES, L::kPackedPipeline>;
  using Base::smem, Base::stage;

  __device__ __forceinline__ explicit PackedKeys(u32 base) : Base(base) {}
  __device__ __forceinline__ u32 keys() const { return smem + L::kPackedKeys + stage * L::kPackedBytes; }
  __device__ __forceinline__ u32 scales() const { return smem + L::kWords + stage * L::kScalesPitch; }
};

// What the producer fills.
template <class C, bool PACKED = kPacked<C>>
struct Loaded : Keys<C> {
  static constexpr u32 kRow = kSlabBytes, kBytes = LogitsLayout<C>::kKeysBytes;
  using Keys<C>::Keys;
};
template <class C>
struct Loaded<C, true> : PackedKeys<C> {
  static constexpr u32 kRow = LogitsLayout<C>::kPackedRow, kBytes = LogitsLayout<C>::kPackedBytes;
  using PackedKeys<C>::PackedKeys;
};

// Where a key of a tile has its scale, or its word of scales.
template <class C>
__device__ __forceinline__ u32 scale_offset(int key) {
  constexpr int kPage = C::PAGE > 0 ? C::PAGE : kTileKeys;
  return C::PAGE > 0 ? key / kPage * LogitsLayout<C>::kPagePitch + key % kPage * 4 : key * 4;
}

template <class C>
struct Queries : Pipeline<C::QUERY_STAGES, LogitsLayout<C>::kQueryPipeline> {
  using L = LogitsLayout<C>;
  using Base = Pipeline<C::QUERY_STAGES, L::kQueryPipeline>;
  using Base::smem, Base::stage;

  __device__ __forceinline__ explicit Queries(u32 base) : Base(base) {}
  __device__ __forceinline__ u32 queries() const { return smem + L::kQueries + stage * L::kQueriesBytes; }
  __device__ __forceinline__ u32 weights() const { return smem + L::kWeights + stage * L::kWeightsPitch; }
  __device__ __forceinline__ u32 run() const { return smem + L::kRuns + stage * 16; }
  __device__ __forceinline__ u32 token(int i) const {
    return smem + L::kTokens + (stage * kBlockTokens<C> + i) * kTokenBytes;
  }
};

}  // namespace jdg
