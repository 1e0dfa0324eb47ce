// The shared memory of a GEMM kernel: a pipeline whose slots hold a block of k of both operands, and beside
// it a ring of scales.
//
// clang-format off
//   rows[STAGES]    128 bytes of k of each row and column of a tile
//   cols[STAGES]
//   staging         of D (epilogue.cuh), or of partial sums (gemm_small_m.cuh)
//   row scales[SCALE_SLOTS] | col scales[SCALE_SLOTS] | scales of 128x128 blocks[SCALE_SLOTS]
//   pipeline | turns | table of groups
// clang-format on
//
// FP8 walks k in quads of four blocks, because one TMA box {4 blocks of k, rows} of the caller's row-major
// scales [rows, k/128] serves four of them. Where k has no whole number of quads, the last one, which lacks
// blocks, comes first: the slots that it does not need follow it without data. 128x128 scales come alike, 16
// bytes for a quad of each 128 rows or columns that a tile touches; those beyond the operand are zeros.
// Scales stored by block of k, [k/128, rows], come one block at a time, by the same rule.
//
// kBlockSlices: rows have scales of their own, columns one for 128 of them, both stored by block of k. A quad
// of these may begin at any block, and tiles are walked from their last block down (producer.cuh): box {rows,
// 4 blocks of k} of the rows' scales, and {4, 4 blocks of k} of those of the columns, as boxes begin at
// multiples of 16 bytes.
//
// kVector32, kBlock32: a block of k has four scales of its own for each row, column or 32 of them, which come
// with it, in boxes {4, rows}.
//
// Scales have no barriers of their own. They arrive with the first block of their quad, counted by its
// barrier. They are read until promotion, when that slot is released already. Their ring has
// ceil(STAGES / 4) + 1 slots: a quad is read before its warpgroup releases the first block of the next one,
// and the producer is at most STAGES blocks ahead. Where every block has its own scales there are STAGES + 1.
//
// Hazard: the one slot more is needed because a load may be under way when its warp arrives at a barrier
// (pipeline.cuh). With it, the promotion, which uses the scales, stands in between.
#pragma once

#include <jax_deepgemm/gemm/config.cuh>
#include <jax_deepgemm/pipeline.cuh>

namespace jdg {

constexpr int kSlotRowBytes = 128;  // bytes of k in a slot: 128 FP8 or 64 BF16 elements
constexpr int kStepsPerBlock = 4;   // wgmma instructions along k for them
constexpr int kQuad = 4;            // blocks of k whose scales travel together

// How many 128-blocks a tile of `width` columns can touch when tiles start at multiples of `width`.
__host__ __device__ constexpr int touched_blocks(int width) {
  return ceil_div(128 - gcd(width, 128) + width, 128);
}

// Where things are in shared memory.
template <class C>
struct Layout {
  static constexpr u32 kRowsBytes = (C::ROWS_K_MAJOR ? C::ROWS : align_up(C::ROWS, 64)) * kSlotRowBytes;
  static constexpr u32 kColsBytes = (C::COLS_K_MAJOR ? C::COLS : align_up(C::COLS, 64)) * kSlotRowBytes;
  static constexpr bool kFp8 = C::ROW_SCALES != Scale::kNone, kByBlock = C::ROW_SCALES == Scale::kSlices;
  static constexpr bool kSliced = C::COL_SCALES == Scale::kSlices, kDown = kByBlock && !kSliced;
  static constexpr bool kFineRows = C::ROW_SCALES == Scale::kVector32,
                        kFineCols = C::COL_SCALES == Scale::kVector32;
  static constexpr bool kFine = kFineRows || C::ROW_SCALES == Scale::kBlock32;  // of 32 of k
  static constexpr int kScaledRows = kFine ? 32 : 128;                          // under one scale of a block
  static constexpr int kScalesOfBlock = kFine ? 4 : 1;                          // of k
  static constexpr bool kRowVector = kByBlock || kFineRows || C::ROW_SCALES == Scale::kVector;
  static constexpr bool kColVector = kSliced || kFineCols || C::COL_SCALES == Scale::kVector;
  static constexpr bool kQuads = kFp8 && !kSliced && !kFine;
  static constexpr int kScaleStep = kSliced || kFine ? 1 : kQuad;  // blocks of k whose scales travel together
  static constexpr u32 kScaleWidth = kScaleStep * kScalesOfBlock * 4;  // bytes of a row's scales for them
  static constexpr u32 kRowScaleBytes = kRowVector ? C::ROWS * kScaleWidth : 0;
  static constexpr u32 kColScaleBytes = kColVector ? align_up(C::COLS * kScaleWidth, 128) : 0;
  static constexpr bool kBlocksOfRows = C::ROW_SCALES == Scale::kBlock;
  static constexpr int kBlocks = kBlocksOfRows                      ? 1
                                 : kDown                            ? 4
                                 : C::ROW_SCALES == Scale::kBlock32 ? C::ROWS / 32
                                 : C::COL_SCALES == Scale::kBlock32 ? C::COLS / 32
                                 : C::COL_SCALES == Scale::kBlock   ? touched_blocks(C::COLS)
                                                                    : 0;  // whose scales are loaded
  static constexpr u32 kBlockScaleBytes = align_up(kBlocks * kQuad * 4, 128);
  static_assert(!kBlocksOfRows || 128 % C::ROWS == 0, "all of a tile's rows are in one 128-block");
  static_assert(kByBlock == (kSliced || C::COL_SCALES == Scale::kBlockSlices), "operands store them alike");
  static_assert(C::COL_SCALES != Scale::kBlock32 || C::COLS % 32 == 0, "whole blocks of columns");
  static_assert(kFine == (kFineCols || C::COL_SCALES == Scale::kBlock32), "operands are scaled alike");
  static_assert(!kDown || (C::COLS % 128 == 0 && 512 % C::COLS == 0), "whole blocks, of four neighbours");
  static_assert(!kFp8 || C::SCALE_SLOTS == ceil_div(C::STAGES, kScaleStep) + 1, "see the head of this file");

  static constexpr u32 kRows = 0;
  static constexpr u32 kCols = kRows + C::STAGES * kRowsBytes;
  static constexpr u32 kStaging = kCols + C::STAGES * kColsBytes;  // 1024-byte aligned
  static constexpr u32 kRowScales = kStaging + C::STAGING_BYTES;
  static constexpr u32 kColScales = kRowScales + C::SCALE_SLOTS * kRowScaleBytes;
  static constexpr u32 kBlockScales = kColScales + C::SCALE_SLOTS * kColScaleBytes;
  static constexpr u32 kPipeline = kBlockScales + C::SCALE_SLOTS * kBlockScaleBytes;
  static constexpr u32 kTurns = Pipeline<C::STAGES, kPipeline>::kEnd;
  static constexpr u32 kTable = kTurns + (C::PING_PONG ? Turns<kTurns>::kBytes : 0);
  static constexpr u32 kBytes = kTable + C::TABLE_BYTES;
  static_assert(kBytes <= C::SHARED_BYTES, "the host computed less shared memory than the kernel uses");

  // Bytes that come through TMA.
  static constexpr u32 kSlotBytes = (C::ROWS_BY_INDEX ? 0 : kRowsBytes) + (C::COLS_BY_INDEX ? 0 : kColsBytes);
  static constexpr u32 kScaleBytes = (C::ROWS_BY_INDEX ? 0 : kRowScaleBytes) +
                                     (kColVector ? C::COLS * kScaleWidth : 0) + kBlocks * kQuad * 4;
};

// The pipeline and the ring of scales, as seen from one side of them.
template <class C>
struct Ring : Pipeline<C::STAGES, Layout<C>::kPipeline> {
  using L = Layout<C>;
  using Base = Pipeline<C::STAGES, L::kPipeline>;
  using Base::smem, Base::stage;

  int scale_slot = 0;
  Turns<L::kTurns> turns;  // ping-pong

  __device__ __forceinline__ explicit Ring(u32 base) : Base(base) {}
  __device__ __forceinline__ u32 rows() const { return smem + L::kRows + stage * L::kRowsBytes; }
  __device__ __forceinline__ u32 cols() const { return smem + L::kCols + stage * L::kColsBytes; }
  __device__ __forceinline__ u32 row_scales() const {
    return smem + L::kRowScales + scale_slot * L::kRowScaleBytes;
  }
  __device__ __forceinline__ u32 col_scales() const {
    return smem + L::kColScales + scale_slot * L::kColScaleBytes;
  }
  __device__ __forceinline__ u32 block_scales() const {
    return smem + L::kBlockScales + scale_slot * L::kBlockScaleBytes;
  }
  // Hazard: what an index names is written through the generic proxy, and read by wgmma (gather.cuh).
  __device__ __forceinline__ void wait_full(int ahead = 0) const {
    Base::wait_full(ahead);
    if constexpr (kByIndex<C>) ptx::fence_proxy_async();
  }
  // A warp's arrival, by one of its lanes. Scales that cp.async has written are handed back by each lane that
  // has read some, which is what compute-sanitizer can follow.
  static constexpr int kReleases = C::ROWS_BY_INDEX && L::kFp8 ? 32 : 1;
  __device__ __forceinline__ static void release(u32 empty) {
    if (kReleases == 32 || threadIdx.x % 32 == 0) Base::release(empty);
  }
  __device__ __forceinline__ void pass(int ahead = 0) const {
    Base::wait_full(ahead);
    __syncwarp();  // as Pipeline::pass says
    release(Base::empty(ahead));
  }
  __device__ __forceinline__ void advance_scales() {
    if (++scale_slot == C::SCALE_SLOTS) scale_slot = 0;
  }

  // Ping-pong: the next tile is for the other warpgroup. Whoever finds the end passes it on as well.
  __device__ __forceinline__ void pass_turn(int warpgroup) const {
    if constexpr (C::PING_PONG) turns.pass(*this, warpgroup);
  }
  __device__ __forceinline__ void await_turn(int warpgroup) {
    if constexpr (C::PING_PONG) turns.await(*this, warpgroup);
  }
};

// By all threads of a block, before anything else.
template <class C>
__device__ __forceinline__ void init_barriers(u32 smem) {
  const Ring<C> ring(smem);
  if (threadIdx.x == 0) {
    ring.init(4 * kSharers<C> * Ring<C>::kReleases, kByIndex<C> ? 1 + kGatherers : 1);
    if (C::PING_PONG) Turns<Layout<C>::kTurns>::init(smem);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
}

}  // namespace jdg
