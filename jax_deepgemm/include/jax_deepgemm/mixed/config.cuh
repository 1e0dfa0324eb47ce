// What a kernel of mixed-input products is told at compile time (ops/mixed/sm90 writes it as
// `struct Config`), and what follows from it. The weight's rows lie on wgmma's 64-row side and come from
// registers, where they are expanded; tokens lie on its narrow side and come from shared memory. In
// staged.cuh it is the other way round, and both come from shared memory.
#pragma once

#include <jax_deepgemm/grouped/gemm_grouped.cuh>

namespace jdg {

enum class Weights {
  kFp4,      // slabs of FP4 (ops/quantize/slabs.py), for tokens of e4m3 with scales of 1x128
  kFp4Bf16,  // the same slabs, for tokens of bf16
  kNvfp4,    // slabs of NVFP4 (ops/quantize/nvfp4_slabs.py), for tokens of bf16
  kInt8,     // [k, n] of int8, for tokens of bf16; a scale for each of n
  kE4m3,     // the same of e4m3
};

// clang-format off
template <class C>
concept MixedConfig = requires {
  typename C::Mma;    // wgmma of width ROWS with A in registers (jit/wgmma.py); staged: of width COLS
  typename C::Out;    // elements of D: bf16 or float
  typename C::Scale;  // of the scales: of tokens (kFp4, float), or of the weight: bf16 or float
  C::WEIGHTS;         // Weights
  C::DENSE;           // bool: whether there are no groups; else GroupedConfig (grouped/group_table.cuh)

  // The tile
  C::ROWS;          // tokens: a multiple of 8, the width of the instruction (staged: 256)
  C::COLS;          // rows of the weight: kHeight for each of the warpgroups side by side
  C::DEEP;          // warpgroups that take the blocks of k of a tile in turn, each with sums of its own
  C::SPLITS;        // blocks of a cluster that share a tile's k, of which the grid then has one a tile

  // Who does it
  C::REGISTERS;           // that a consumer thread may use
  C::PRODUCER_REGISTERS;  // that a producer thread keeps, where consumers take over the others; else 0

  // Shared memory
  C::STAGES;        // slots of the pipeline: a multiple of DEEP
  C::SHARED_BYTES;  // what the host reserves in all

  // Memory
  C::ONCE;          // bool: whether L2 may drop the weight's lines first, as one SM reads them
};
// clang-format on

// A slab is 64 rows by 128 of k of an FP4 weight, a box 64 of k by 128 rows of one in bytes: what a warpgroup
// multiplies at a time, with tokens whose rows in a slot are 128 bytes.
constexpr int kSlabBytes4 = 4368, kSlabExponents = 4096, kSlabBase = 4352;
constexpr int kSlabBytes16 = 4624, kSlabScales16 = 4096, kSlabBase16 = 4608;  // of NVFP4
constexpr int kBoxBytes = 64 * 128;

template <class C>
constexpr bool kScaledTokens = C::WEIGHTS == Weights::kFp4;
template <class C>
constexpr bool kPlainSlabs = C::WEIGHTS == Weights::kFp4Bf16 || C::WEIGHTS == Weights::kNvfp4;
template <class C>
constexpr bool kInSlabs = kScaledTokens<C> || kPlainSlabs<C>;
template <class C>
constexpr int kPartBytes = !kInSlabs<C>                    ? kBoxBytes
                           : C::WEIGHTS == Weights::kNvfp4 ? kSlabBytes16
                                                           : kSlabBytes4;  // of the weight, of a warpgroup
template <class C>
constexpr int kTokenTiles = kPlainSlabs<C> ? 2 : 1;  // of 128 bytes of k, in a slot
template <class C>
constexpr int kHeight = kInSlabs<C> ? 64 : 128;  // rows of the weight of a warpgroup
template <class C>
constexpr int kAcross = C::COLS / kHeight<C>;  // warpgroups side by side
template <class C>
constexpr int kWarpgroups = kAcross<C> * C::DEEP;

// clang-format off
//   tokens[STAGES]         kTokenTiles of ROWS rows of 128 bytes of k, swizzled
//   weights[STAGES]        a slab, or a swizzled box, of each warpgroup side by side
//   scales[STAGES + DEEP]  kFp4: a float for each token
//   sums                   float32 tiles of the warpgroups, and of the cluster's blocks, that hand theirs over
//   pipeline | arrived | table of groups
// clang-format on
//
// Hazard: scales are read when a slot is released already, by the promotion, so their ring has DEEP slots
// more: the producer cannot come to a slot of scales before the warpgroup that read it has released the next
// block that it takes.
template <class C>
struct MixedLayout {
  static constexpr u32 kTokenTileBytes = C::ROWS * 128, kTokenBytes = kTokenTiles<C> * kTokenTileBytes;
  static constexpr u32 kWeightBytes = kPartBytes<C>;
  static constexpr u32 kWeightsBytes = kAcross<C> * kWeightBytes;
  static constexpr u32 kScaleBytes = kScaledTokens<C> ? C::ROWS * 4 : 0, kTileBytes = C::ROWS * C::COLS * 4;
  static constexpr int kScaleSlots = C::STAGES + C::DEEP;

  static constexpr u32 kTokens = 0;
  static constexpr u32 kWeights = kTokens + C::STAGES * kTokenBytes;  // a multiple of 1024, for boxes
  static constexpr u32 kScales = kWeights + C::STAGES * kWeightsBytes;
  static constexpr u32 kSums = kScales + kScaleSlots * kScaleBytes;
  static constexpr u32 kFromRanks = kSums + (C::DEEP - 1) * kTileBytes;
  static constexpr u32 kPipeline = kFromRanks + (C::SPLITS - 1) * kTileBytes;
  static constexpr u32 kArrived = Pipeline<C::STAGES, kPipeline>::kEnd;
  static constexpr u32 kTable = kArrived + 16;
  static constexpr u32 kBytes = kTable + C::TABLE_BYTES;
  static_assert(C::STAGES % C::DEEP == 0, "a slot is always the same warpgroup's");
  static_assert(kBytes <= C::SHARED_BYTES, "the host computed less shared memory than the kernel uses");
};

// The pipeline and the ring of scales, as seen from one side of them.
template <class C>
struct MixedRing : Pipeline<C::STAGES, MixedLayout<C>::kPipeline> {
  using L = MixedLayout<C>;
  using Base = Pipeline<C::STAGES, L::kPipeline>;
  using Base::smem, Base::stage, Base::phase;

  int scale_slot;

  __device__ __forceinline__ MixedRing(u32 base, int first) : Base(base), scale_slot(first) { stage = first; }
  __device__ __forceinline__ u32 tokens() const { return smem + L::kTokens + stage * L::kTokenBytes; }
  __device__ __forceinline__ u32 weights(int across) const {
    return smem + L::kWeights + stage * L::kWeightsBytes + across * L::kWeightBytes;
  }
  __device__ __forceinline__ u32 scales() const { return smem + L::kScales + scale_slot * L::kScaleBytes; }

  template <int STEP>
  __device__ __forceinline__ void move_on() {
    stage += STEP;
    scale_slot += STEP;
    if (stage >= C::STAGES) stage -= C::STAGES, phase ^= 1;
    if (scale_slot >= L::kScaleSlots) scale_slot -= L::kScaleSlots;
  }
};

}  // namespace jdg
