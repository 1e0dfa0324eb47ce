// What a kernel of mixed-input products is told at compile time (ops/mixed/sm90.py writes it as
// `struct Config`), and what follows from it. The weight's rows lie on wgmma's 64-row side and come from
// registers, where they are expanded; tokens lie on its narrow side and come from shared memory.
#pragma once

#include <jax_deepgemm/grouped/gemm_grouped.cuh>

namespace jdg {

// clang-format off
template <class C>
concept MixedConfig = requires {
  typename C::Mma;  // wgmma of width ROWS with A in registers (jit/wgmma.py)
  typename C::Out;  // elements of D: bf16 or float
  C::DENSE;         // bool: whether there are no groups; else GroupedConfig (grouped/group_table.cuh)

  // The tile
  C::ROWS;          // tokens: a multiple of 8, the width of the instruction
  C::COLS;          // rows of the weight: 64 for each of the warpgroups side by side
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

// A slab is 64 rows by 128 of k of the weight (ops/quantize/fp4.py says what is where).
constexpr int kWeightSlabBytes = 4368, kSlabExponents = 4096, kSlabBase = 4352;

template <class C>
constexpr int kAcross = C::COLS / 64;  // warpgroups side by side
template <class C>
constexpr int kWarpgroups = kAcross<C>* C::DEEP;

// clang-format off
//   tokens[STAGES]       ROWS rows of 128 bytes of k, swizzled
//   slabs[STAGES]        one of each warpgroup side by side
//   scales[STAGES + DEEP]  a float for each token
//   sums                 float32 tiles of the warpgroups, and of the cluster's blocks, that hand theirs over
//   pipeline | arrived | table of groups
// clang-format on
//
// Hazard: scales are read when a slot is released already, by the promotion, so their ring has DEEP slots
// more: the producer cannot come to a slot of scales before the warpgroup that read it has released the next
// block that it takes.
template <class C>
struct MixedLayout {
  static constexpr u32 kTokenBytes = C::ROWS * 128, kSlabsBytes = kAcross<C> * kWeightSlabBytes;
  static constexpr u32 kScaleBytes = C::ROWS * 4, kTileBytes = C::ROWS * C::COLS * 4;
  static constexpr int kScaleSlots = C::STAGES + C::DEEP;

  static constexpr u32 kTokens = 0;
  static constexpr u32 kSlabs = kTokens + C::STAGES * kTokenBytes;
  static constexpr u32 kScales = kSlabs + C::STAGES * kSlabsBytes;
  static constexpr u32 kSums = kScales + kScaleSlots * kScaleBytes;
  static constexpr u32 kFromRanks = kSums + (C::DEEP - 1) * kTileBytes;
  static constexpr u32 kPipeline = kFromRanks + (C::SPLITS - 1) * kTileBytes;
  static constexpr u32 kArrived = Pipeline<C::STAGES, kPipeline>::kEnd;
  static constexpr u32 kTable = kArrived + 16;
  static constexpr u32 kBytes = kTable + C::TABLE_BYTES;
  static_assert(C::STAGES % C::DEEP == 0, "a slot is always the same warpgroup's");
  static_assert(kBytes <= C::SHARED_BYTES, "the host computed less shared memory than the kernel uses");
};

}  // namespace jdg
