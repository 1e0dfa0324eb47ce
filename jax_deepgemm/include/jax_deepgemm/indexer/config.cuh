// What an indexer kernel is told at compile time: every field of its configuration, which ops/indexer/sm90.py
// writes as `struct Config`, and what follows from it.
//
// wgmma multiplies keys (its M side, 64 at a time) by columns (its N side): the heads of a few tokens, one
// token behind the other. These tokens are a bank.
#pragma once

#include <jax_deepgemm/pipeline.cuh>

namespace jdg {

// clang-format off
template <class C>
concept LogitsConfig = requires {
  typename C::Mma;         // wgmma of one width, TOKENS * HEADS + LINEAR: Mma::issue, made by jit/wgmma.py
  typename C::Out;         // elements of the result: float or bf16
  C::HEADS;                // of a token, a multiple of 8; those that it does not have are zeros
  C::TOKENS;               // of a bank: as many as are multiplied by one instruction
  C::LINEAR;               // columns of a bank that stand for the linear half of its sums (linear.cuh), or 0
  C::BANKS;                // of tokens, one after the other multiplied by the same keys
  C::CONSUMERS;            // warpgroups that score 64 keys each
  C::SLABS;                // pieces of 128 bytes that a key, or a head, has of d
  C::STEPS;                // wgmma instructions along d: 32 bytes each
  C::SCALED;               // bool: whether keys have scales (FP8)
  C::COMPRESSED;           // bool: whether a row's first column is the first key of its window
  C::STAGES;               // slots of the pipeline of keys
  C::QUERY_STAGES;         // slots of the pipeline of tokens
  C::PACKED_STAGES;        // slots of the pipeline of keys in FP4; 0: keys are what is multiplied
  C::PAGE;                 // keys of a page; 0: keys lie one behind the other
  C::OF_TOKENS;            // bool: whether requests have any number of tokens, and tokens say whose they are
  C::TENSOR_SUMS;          // bool: whether products of warps sum over heads (a multiple of 16)
  C::SHARED_BYTES;         // what the host reserves
};
// clang-format on

template <class C>
constexpr int kTileKeys = 64 * C::CONSUMERS;
template <class C>
constexpr bool kPacked = C::PACKED_STAGES > 0;
template <class C>
constexpr int kIndexerThreads = 128 * (C::CONSUMERS + 1 + kPacked<C>);
constexpr int kLinearWarps = 2;  // that write linear columns, where there are any
constexpr int kSlabBytes = 128;
template <class C>
constexpr int kSlabElements = C::SCALED ? 128 : 64;  // FP8, or BF16

template <class C>
constexpr int kBankHeads = C::TOKENS * C::HEADS;
template <class C>
constexpr int kBankCols = kBankHeads<C> + C::LINEAR;
template <class C>
constexpr int kBlockCols = C::BANKS * kBankCols<C>;
template <class C>
constexpr int kBlockTokens = C::BANKS * C::TOKENS;
template <class C>
constexpr int kPageKeys = C::PAGE > 0 ? C::PAGE : kTileKeys<C>;  // that are loaded at once
template <class C>
constexpr int kTilePages = kTileKeys<C> / kPageKeys<C>;

// What a block of threads knows of a token.
//
// A row of the result begins with the key `first`; keys from `start` on and before `end` have a score, the
// others before `last` minus infinity. Keys beyond have no column. Element `key` of a row is at `row` + key.
struct Token {
  u64 row;
  int start, end, first, last;
};
constexpr int kTokenBytes = 32;  // in shared memory: start, end, first, last | row | step
constexpr u32 kTokenRow = 16;
constexpr u32 kTokenStep = 24;  // of its linear columns

// The tiles of a block of tokens: the first key, how many (0: there is nothing more to do), and the keys that
// are in the windows of all tokens.
struct Run {
  int key, tiles, begin, end;
};

constexpr u32 kTableBytes = 160;  // of expand.cuh

// Where things are in shared memory.
template <class C>
struct LogitsLayout {
  static constexpr u32 kKeysBytes = C::SLABS * kTileKeys<C> * kSlabBytes;
  static constexpr u32 kQueriesBytes = C::SLABS * kBlockCols<C> * kSlabBytes;
  static constexpr u32 kScalesBytes = C::SCALED ? kTileKeys<C> * 4 : 0;
  static constexpr u32 kPagePitch = C::PAGE * 4 < 128 ? 128 : C::PAGE * 4;  // of a page's scales
  static constexpr u32 kScalesPitch = C::PAGE > 0 ? kTilePages<C> * kPagePitch : kScalesBytes;
  static constexpr u32 kPackedRow = C::STEPS * 16;  // of a key of 32 C::STEPS numbers
  static constexpr u32 kPackedBytes = kPacked<C> ? kTileKeys<C> * kPackedRow : 0;
  static constexpr u32 kWeightsBytes = C::BANKS * kBankHeads<C> * 4;
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
  static constexpr u32 kReady = kTable + (kPacked<C> ? kTableBytes : 0);
  static constexpr u32 kShare = kReady + (C::LINEAR > 0 ? align_up(C::QUERY_STAGES * 8, 16) : 0);
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
  constexpr int kPage = kPageKeys<C>;
  return C::PAGE > 0 ? key / kPage * LogitsLayout<C>::kPagePitch + key % kPage * 4 : key * 4;
}

// All lanes of the producer write what is known of tokens, and all threads of consumers read it: all of them
// arrive. Linear columns are written when the rest is there, and make the slot `ready`.
template <class C>
struct Queries : Pipeline<C::QUERY_STAGES, LogitsLayout<C>::kQueryPipeline> {
  using L = LogitsLayout<C>;
  using Base = Pipeline<C::QUERY_STAGES, L::kQueryPipeline>;
  using Base::phase, Base::smem, Base::stage;

  __device__ __forceinline__ explicit Queries(u32 base) : Base(base) {}
  __device__ __forceinline__ u32 queries() const { return smem + L::kQueries + stage * L::kQueriesBytes; }
  __device__ __forceinline__ u32 weights() const { return smem + L::kWeights + stage * L::kWeightsPitch; }
  __device__ __forceinline__ u32 run() const { return smem + L::kRuns + stage * 16; }
  __device__ __forceinline__ u32 token(int i) const {
    return smem + L::kTokens + (stage * kBlockTokens<C> + i) * kTokenBytes;
  }
  __device__ __forceinline__ u32 ready() const { return smem + L::kReady + stage * 8; }

  __device__ __forceinline__ void init() const {
    Queries at(smem);
    for (at.stage = 0; at.stage < C::QUERY_STAGES; ++at.stage) {
      ptx::mbarrier_init(at.full(), 32);
      ptx::mbarrier_init(at.empty(), 128 * C::CONSUMERS);
      if constexpr (C::LINEAR > 0) ptx::mbarrier_init(at.ready(), 32 * kLinearWarps);
    }
  }
  __device__ __forceinline__ void wait_ready() const {
    if constexpr (C::LINEAR > 0) ptx::mbarrier_wait(ready(), phase);
  }
};

}  // namespace jdg
