// What a GEMM kernel is told at compile time: every field of its configuration, which
// ops/gemm/sm90/source.py writes as `struct Config`, and what follows from it.
//
// wgmma multiplies "rows" (its M side, 64 at a time: A, or with SWAP_AB the weights B) by "cols" (its N side,
// the width of the instruction).
#pragma once

#include <jax_deepgemm/ptx/types.cuh>

namespace jdg {

enum class Scale {
  kNone,    // BF16
  kVector,  // one factor for each row (column) and 128 of k, stored [rows, k/128]
  kSlices,  // the same, stored [k/128, rows]
  kBlock,   // one factor for each 128 rows (columns) and 128 of k, stored [rows/128, k/128]
  // The same of columns, stored [k/128, columns/128], beside rows that are kSlices.
  kBlockSlices,
  kVector32,  // one factor for each row (column) and 32 of k, stored [rows, k/32]
  kBlock32,   // one factor for each 32 rows (columns) and 32 of k, stored [rows/32, k/32]
};

// clang-format off
template <class C>
concept GemmConfig = requires {
  // The product
  typename C::Mma;         // wgmma of one width: Mma::issue, made by jit/wgmma.py
  typename C::Out;         // elements of C and D: bf16 or float
  C::ROWS_K_MAJOR;         // bool: whether k is the rows' contiguous axis (always for FP8)
  C::COLS_K_MAJOR;         // bool: the same of the columns
  C::ROW_SCALES;           // Scale: the scales of the rows; kNone makes this a BF16 kernel
  C::COL_SCALES;           // Scale: the scales of the columns
  C::SWAP_AB;              // bool: whether rows are B's and columns A's, so that D is stored transposed
  C::GATED;                // bool: whether a tile's columns are rows of gate and, behind them, those of up
                           // of the same features (grouped/gemm_grouped_swiglu.cuh, finish.cuh)
  C::MASK_K;               // bool: whether a tile's k may begin or end inside a block (k in groups)
  C::RUNS;                 // bool: whether k is several runs of whole blocks, which lie as batches do (einsum)
  C::WHOLE_BLOCKS;         // bool: whether groups of k begin with a block, and the last one holds zeros behind
                           // their end: it is multiplied no further than it counts (FP8)

  // The tile
  C::ROWS;                 // height of a tile: 64, 128, 192 or 256
  C::COLS;                 // width of a tile: a multiple of 8 up to 256
  C::BLOCK_K;              // elements of k in a slot, 128 bytes of them: 128 of FP8, 64 of BF16
  C::PASSES;               // products, one after the other, over the columns of a tile: 1, or 2 (FP8, 256)
  C::HALVES;               // bool: whether the last tiles may be cut in two, of half the columns and one pass
  C::SPLITS;               // blocks of a cluster that share a tile's k (gemm_small_m.cuh); else 1

  // Who does it
  C::WARPGROUPS;           // consumer warpgroups
  C::ACROSS;               // of them side by side: 2 have half of the columns each; else 1
  C::PING_PONG;            // bool: whether two warpgroups have whole tiles in turn, instead of shares of each
  C::REGISTERS;            // that a consumer thread may use
  C::PRODUCER_REGISTERS;   // that a producer thread keeps, where consumers take over the others; else unused

  // Shared memory
  C::STAGES;               // slots of the pipeline
  C::SCALE_SLOTS;          // slots of the ring of scales (ring.cuh)
  C::SLABS;                // buffers of 8 rows of 128 bytes of D for each consumer warp; 0 without TMA_STORE
  C::STAGING_BYTES;        // all slabs, or what the blocks of a cluster send each other
  C::TABLE_BYTES;          // the table of groups (grouped/group_table.cuh); 0 in dense kernels
  C::SHARED_BYTES;         // what the host reserves in all

  // Memory
  C::ROWS_ONCE;            // bool: whether L2 may drop the rows first, as few SMs read them (weights)
  C::COLS_ONCE;            // bool: the same of the columns
  C::ADD;                  // bool: whether C is read and added
  C::REDUCE;               // bool: whether D lies in C's memory and products are added to it there
  C::TMA_STORE;            // bool: whether D leaves through TMA, which needs rows of a multiple of 16 bytes
  C::EVEN_N;               // bool: whether n is even, so that two elements of D are loaded and stored at once
  C::BATCH_INSIDE;         // bool: whether D and C are stored [row, batch, column]; else [batch, row, column]
  C::BATCHES_TOGETHER;     // bool: whether the tiles of all batches come before the next rows
  C::ROWS_BY_INDEX;        // bool: whether an index names the rows (K-major) or their values of k (gather.cuh)
  C::COLS_BY_INDEX;        // bool: whether it names values of k of the columns (MN-major)
};
// clang-format on

// Whether a warpgroup produces: its threads copy what an index names, and one of them loads the rest.
template <class C>
constexpr bool kByIndex = C::ROWS_BY_INDEX || C::COLS_BY_INDEX;
constexpr int kGatherers = 128;

// Warpgroups that share a tile (in ping-pong they have whole tiles, in turn): one below the other, or ACROSS
// of them side by side. Each multiplies its share in parts of 64 rows by kCols columns.
template <class C>
constexpr int kSharers = C::PING_PONG ? 1 : C::WARPGROUPS;
template <class C>
constexpr int kParts = C::ROWS / 64 * C::ACROSS / kSharers<C>;
template <class C>
constexpr int kCols = C::COLS / C::ACROSS;

// Where a warpgroup's share of a tile begins: which 64 of its rows, which of its columns.
template <class C>
__device__ __forceinline__ int first_part(int warpgroup) {
  return kSharers<C> > C::ACROSS ? warpgroup * kParts<C> : 0;
}
template <class C>
__device__ __forceinline__ int first_col(int warpgroup) {
  return C::ACROSS > 1 ? warpgroup * kCols<C> : 0;
}

}  // namespace jdg
