// The ring of shared-memory slots between one TMA producer thread and the consumer warpgroups of a block, and
// the producer's side of it. The consumers' side is mainloop.cuh.
//
//   producer thread                          consumer warpgroup w
//   wait empty[s]                            wait full[s]
//   expect bytes on full[s]                  read scales of this block of k
//   TMA rows tile, cols tile -> slot s       4 wgmma over the 128 bytes of k in the slot
//   every 4th block: quads of scales         wait for them, arrive empty[s], promote: acc += scale * product
//
// wgmma multiplies "rows" (its M side, 64 at a time, A or the weights) by "cols" (its N side, the tile
// width).
//
// FP8 walks k in quads of four blocks, because one TMA box {4 blocks of k, rows} of the caller's row-major
// scales [rows, k/128] serves four of them. Where k has no whole number of quads, the last one, which lacks
// blocks, comes first: the slots that it does not need follow it without data. 128x128 scales come alike, 16
// bytes for a quad of each 128 rows or columns that a tile touches; those beyond the operand are zeros. The
// quads of scales form a ring of ceil(STAGES / 4) + 1 slots without barriers of their own: a quad is read
// before its warpgroup releases the first block of the next one, and the producer is at most STAGES blocks
// ahead. Scales stored by block of k, [k/128, rows], come one block at a time, by the same rule.
//
// Hazard: a load from shared memory may still be under way when its warp arrives at an mbarrier behind it;
// only an instruction that uses the value proves it done. Hence the one slot more: with it, the promotion
// stands in between.
#pragma once

#include <jax_deepgemm/ptx/barrier.cuh>
#include <jax_deepgemm/ptx/memory.cuh>
#include <jax_deepgemm/ptx/tma.cuh>

namespace jdg {

enum class Scale {
  kNone,    // BF16
  kVector,  // one factor for each row (column) and 128 of k, stored [rows, k/128]
  kSlices,  // the same, stored [k/128, rows]
  kBlock,   // one factor for each 128 rows (columns) and 128 of k
};

constexpr int kSlotRowBytes = 128;  // bytes of k in a slot: 128 FP8 or 64 BF16 elements
constexpr int kStepsPerBlock = 4;   // wgmma instructions along k for them
constexpr int kQuad = 4;            // blocks of k whose scales travel together

// Warpgroups that share a tile (in ping-pong they have whole tiles, in turn): one below the other, or ACROSS
// of them side by side. Each multiplies its share in parts of 64 rows by kCols columns.
template <class C>
constexpr int kSharers = C::PING_PONG ? 1 : C::WARPGROUPS;
template <class C>
constexpr int kParts = C::ROWS / 64 * C::ACROSS / kSharers<C>;
template <class C>
constexpr int kCols = C::COLS / C::ACROSS;
template <class C>
constexpr int kReleases = 4 * kSharers<C>;  // arrivals that free a slot

// How many 128-blocks a tile of `width` columns can touch when tiles start at multiples of `width`.
__host__ __device__ constexpr int touched_blocks(int width) {
  return ceil_div(128 - gcd(width, 128) + width, 128);
}

// Where things are in shared memory. C is a kernel's configuration; its fields are named in sm90/config.py.
template <class C>
struct Layout {
  static constexpr u32 kRowsBytes = (C::ROWS_K_MAJOR ? C::ROWS : align_up(C::ROWS, 64)) * kSlotRowBytes;
  static constexpr u32 kColsBytes = (C::COLS_K_MAJOR ? C::COLS : align_up(C::COLS, 64)) * kSlotRowBytes;
  static constexpr bool kFp8 = C::ROW_SCALES != Scale::kNone, kSliced = C::ROW_SCALES == Scale::kSlices;
  static constexpr bool kRowVector = kSliced || C::ROW_SCALES == Scale::kVector;
  static constexpr bool kColVector = kSliced || C::COL_SCALES == Scale::kVector;
  static constexpr bool kQuads = kFp8 && !kSliced;
  static constexpr int kScaleStep = kSliced ? 1 : kQuad;  // blocks of k whose scales travel together
  static constexpr u32 kRowScaleBytes = kRowVector ? C::ROWS * kScaleStep * 4 : 0;
  static constexpr u32 kColScaleBytes = kColVector ? align_up(C::COLS * kScaleStep * 4, 128) : 0;
  static constexpr bool kBlocksOfRows = C::ROW_SCALES == Scale::kBlock;
  static constexpr int kBlocks = kBlocksOfRows                    ? 1
                                 : C::COL_SCALES == Scale::kBlock ? touched_blocks(C::COLS)
                                                                  : 0;  // 128-blocks that have a scale
  static constexpr u32 kBlockScaleBytes = align_up(kBlocks * kQuad * 4, 128);
  static_assert(!kBlocksOfRows || 128 % C::ROWS == 0, "all of a tile's rows are in one 128-block");
  static_assert(kSliced == (C::COL_SCALES == Scale::kSlices), "both operands store their scales alike");
  static_assert(!kFp8 || C::SCALE_SLOTS == ceil_div(C::STAGES, kScaleStep) + 1, "see the head of this file");

  static constexpr u32 kRows = 0;
  static constexpr u32 kCols = kRows + C::STAGES * kRowsBytes;
  static constexpr u32 kStaging = kCols + C::STAGES * kColsBytes;  // 1024-byte aligned
  static constexpr u32 kRowScales = kStaging + C::STAGING_BYTES;
  static constexpr u32 kColScales = kRowScales + C::SCALE_SLOTS * kRowScaleBytes;
  static constexpr u32 kBlockScales = kColScales + C::SCALE_SLOTS * kColScaleBytes;
  static constexpr u32 kBarriers = kBlockScales + C::SCALE_SLOTS * kBlockScaleBytes;
  static constexpr u32 kTiles = kBarriers + 2 * C::STAGES * 8;  // 16-byte aligned
  static constexpr u32 kTurn = kTiles + C::STAGES * 16;
  static constexpr u32 kTable = kTurn + (C::PING_PONG ? 32 : 0);  // of groups; dense kernels have none
  static constexpr u32 kBytes = kTable + C::TABLE_BYTES;
  static_assert(kBytes <= C::SHARED_BYTES, "the host computed less shared memory than the kernel uses");

  static constexpr u32 kSlotBytes = kRowsBytes + kColsBytes;
  static constexpr u32 kScaleBytes =
      kRowScaleBytes + (kColVector ? C::COLS * kScaleStep * 4 : 0) + kBlocks * kQuad * 4;
};

// A slot of the ring, as seen from one side of it.
template <class C>
struct Position {
  u32 smem;
  int stage = 0;
  u32 phase = 0;
  int quad_slot = 0;
  u32 turn_phase = 0;  // ping-pong

  __device__ __forceinline__ explicit Position(u32 base) : smem(base) {}
  __device__ __forceinline__ u32 full() const { return smem + Layout<C>::kBarriers + stage * 8; }
  __device__ __forceinline__ u32 empty() const { return full() + C::STAGES * 8; }
  __device__ __forceinline__ u32 rows() const {
    return smem + Layout<C>::kRows + stage * Layout<C>::kRowsBytes;
  }
  __device__ __forceinline__ u32 cols() const {
    return smem + Layout<C>::kCols + stage * Layout<C>::kColsBytes;
  }
  __device__ __forceinline__ u32 row_scales() const {
    return smem + Layout<C>::kRowScales + quad_slot * Layout<C>::kRowScaleBytes;
  }
  __device__ __forceinline__ u32 col_scales() const {
    return smem + Layout<C>::kColScales + quad_slot * Layout<C>::kColScaleBytes;
  }
  __device__ __forceinline__ u32 block_scales() const {
    return smem + Layout<C>::kBlockScales + quad_slot * Layout<C>::kBlockScaleBytes;
  }
  // Ping-pong: a warpgroup's turn is a barrier and, behind it, the slot where its next tile begins.
  __device__ __forceinline__ u32 turn(int warpgroup) const {
    return smem + Layout<C>::kTurn + warpgroup * 16;
  }
  template <int SLOTS = 1>  // a divisor of STAGES
  __device__ __forceinline__ void advance() {
    stage += SLOTS;
    if (stage == C::STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ void advance_scales() {
    if (++quad_slot == C::SCALE_SLOTS) quad_slot = 0;
  }
};

// Which consumer warpgroup this thread is in; the shuffle tells the compiler that it is the same for a whole
// warp, so that descriptors are computed in uniform registers.
__device__ __forceinline__ int warpgroup_index() { return __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0); }
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0); }

template <int COUNT>
__device__ __forceinline__ void clear(float (&acc)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) acc[i] = 0.0f;
}

// Where a warpgroup's share of a tile begins: which 64 of its rows, which of its columns.
template <class C>
__device__ __forceinline__ int first_part(int warpgroup) {
  return kSharers<C> > C::ACROSS ? warpgroup * kParts<C> : 0;
}
template <class C>
__device__ __forceinline__ int first_col(int warpgroup) {
  return C::ACROSS > 1 ? warpgroup * kCols<C> : 0;
}

// The part of the product that a block of threads computes at a time.
struct Tile {
  int row, col, batch;
  int k_begin, k_end;       // blocks of k; FP8 begins at a multiple of four
  int col_batch = batch;    // of the cols operand
  int k_first = 0;          // where block 0 begins; a multiple of 128 for FP8
  int k_skip = 0;           // elements of the first block that do not count, and ...
  int k_stop = 0x7FFFFFFF;  // ... elements of the last block up to which they count
  bool half = false;        // only the first half of the columns, the first of two passes; all are loaded
};

// The producer says with the first block of a tile which tile it is, so that consumers need no arithmetic for
// it, and sends kNoTile when there are no more. A record may be overwritten when its slot may.
constexpr int kNoTile = -1;

template <class C>
__device__ __forceinline__ void publish_tile(const Position<C>& at, int row, int col, int batch, bool half) {
  ptx::store_shared_4(at.smem + Layout<C>::kTiles + at.stage * 16, row, col, batch, half);
}

// Lane 0 reads, because lane 0 is the one that later releases the slot. All of the tile's k, from block 0 on.
template <class C>
__device__ __forceinline__ Tile receive_tile(const Position<C>& at, int k_blocks) {
  ptx::mbarrier_wait(at.full(), at.phase);
  float4 record = {0.0f, 0.0f, 0.0f, 0.0f};
  if (threadIdx.x % 32 == 0) record = ptx::load_shared_4(at.smem + Layout<C>::kTiles + at.stage * 16);
  const auto shared = [](float v) { return __float_as_int(__shfl_sync(0xFFFFFFFF, v, 0)); };
  Tile tile = {shared(record.x), shared(record.y), shared(record.z), 0, k_blocks};
  if constexpr (C::HALVES) tile.half = shared(record.w) != 0;
  return tile;
}

// How many blocks the first quad of a tile has; all further ones are whole.
__device__ __forceinline__ int first_quad_blocks(int blocks) { return (blocks + kQuad - 1) % kQuad + 1; }

// A tile without any k (a group's zeros) takes slots without data, as many as keep quads where they belong.
template <class C>
constexpr int kEmptySlots = Layout<C>::kFp8 ? Layout<C>::kScaleStep : 1;

// Hands back a slot that holds nothing.
//
// Hazard: all lanes must have left the wait. Once lane 0 has released the slot, the producer, which has
// nothing to load either, can complete the barrier's next phase before a lane that lags behind looks at this
// one: it would wait for ever. Between wait and release of other slots stands wgmma, which all lanes execute
// together.
__device__ __forceinline__ void pass_slot(u32 full, u32 empty, u32 phase) {
  ptx::mbarrier_wait(full, phase);
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty);
}

template <class C>
__device__ __forceinline__ void skip_empty_tile(Position<C>& at) {
#pragma unroll 1
  for (int i = 0; i < kEmptySlots<C>; ++i) {
    pass_slot(at.full(), at.empty(), at.phase);
    at.advance();
  }
}

// Ping-pong: the ring's next tile is for the other warpgroup, from the slot at `at` on. Whoever finds the end
// passes it on as well.
//
// Hazard: an mbarrier tells one phase from the next only, so nobody looks at slots further on: a warpgroup
// comes to its tile when all slots before it were full. Each has a place of its own to read where its tile
// begins, which is written again when all of its warps have passed the turn on.
template <class C>
__device__ __forceinline__ void pass_turn(const Position<C>& at, int warpgroup) {
  if constexpr (C::PING_PONG) {
    const u32 turn = at.turn(1 - warpgroup);
    if (threadIdx.x % 128 == 0)
      ptx::store_shared_2(turn + 8, __int_as_float(at.stage), __uint_as_float(at.phase));
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(turn);
  }
}

// Lane 0 reads, as in receive_tile.
template <class C>
__device__ __forceinline__ void await_turn(Position<C>& at, int warpgroup) {
  if constexpr (C::PING_PONG) {
    ptx::mbarrier_wait(at.turn(warpgroup), at.turn_phase);
    at.turn_phase ^= 1;
    float2 passed = {0.0f, 0.0f};
    if (threadIdx.x % 32 == 0) passed = ptx::load_shared_2(at.turn(warpgroup) + 8);
    at.stage = __shfl_sync(0xFFFFFFFF, __float_as_int(passed.x), 0);
    at.phase = __shfl_sync(0xFFFFFFFF, __float_as_uint(passed.y), 0);
  }
}

template <class C>
__device__ __forceinline__ void init_barriers(u32 smem) {
  Position<C> at(smem);
  if (threadIdx.x == 0) {
    for (at.stage = 0; at.stage < C::STAGES; ++at.stage) {
      ptx::mbarrier_init(at.full(), 1);
      ptx::mbarrier_init(at.empty(), kReleases<C>);
    }
    if (C::PING_PONG) {
      ptx::mbarrier_init(at.turn(0), 4);
      ptx::mbarrier_init(at.turn(1), 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
}

// The operands in global memory. A batch coordinate is multiplied by 0 where all batches share an operand.
struct Operands {
  const TensorMap* rows;
  const TensorMap* cols;
  const TensorMap* row_scales;  // FP8 only
  const TensorMap* col_scales;  // FP8 only
  int k_blocks;
  int batched_rows, batched_cols, batched_row_scales, batched_col_scales;  // 0 or 1
};

template <class C, bool K_MAJOR, int EXTENT, bool ONCE>
__device__ __forceinline__ void load_operand(u32 slot, const TensorMap& map, u32 bar, int first, int k,
                                             int batch) {
  constexpr auto load = ONCE ? ptx::tma_load_once : ptx::tma_load;
  if constexpr (K_MAJOR) {
    load(slot, map, bar, k, first, batch);
  } else {
#pragma unroll
    for (int slab = 0; slab < ceil_div(EXTENT, 64); ++slab)
      load(slot + slab * 64 * kSlotRowBytes, map, bar, first + slab * 64, k, batch);
  }
}

template <class C>
__device__ __forceinline__ void load_box(u32 slot, const TensorMap& map, u32 bar, int first, int kb,
                                         int batch) {
  if constexpr (Layout<C>::kSliced)
    ptx::tma_load(slot, map, bar, first, kb, batch);
  else
    ptx::tma_load(slot, map, bar, kb, first, batch);
}

// The scales of one step of blocks of k, of both operands.
template <class C>
__device__ __forceinline__ void load_scales(const Position<C>& at, const Operands& in, const Tile& tile,
                                            int kb) {
  using L = Layout<C>;
  load_box<C>(L::kRowVector ? at.row_scales() : at.block_scales(), *in.row_scales, at.full(),
              L::kRowVector ? tile.row : tile.row / 128, kb, tile.batch * in.batched_row_scales);
  load_box<C>(L::kColVector ? at.col_scales() : at.block_scales(), *in.col_scales, at.full(),
              L::kColVector ? tile.col : tile.col / 128, kb, tile.col_batch * in.batched_col_scales);
}

// Producer side: slots without data.
template <class C>
__device__ __forceinline__ void pass_on(Position<C>& at, int slots) {
#pragma unroll 1
  for (int i = 0; i < slots; ++i) {
    ptx::mbarrier_wait(at.empty(), at.phase ^ 1);
    ptx::mbarrier_arrive(at.full());
    at.advance();
  }
}

// One block of k into the slot at `at`; with SCALES those of a whole step of blocks, too.
template <class C, bool SCALES>
__device__ __forceinline__ void load_block(Position<C>& at, const Operands& in, const Tile& tile, int kb) {
  using L = Layout<C>;
  const int k = tile.k_first + kb * C::BLOCK_K;
  ptx::mbarrier_wait(at.empty(), at.phase ^ 1);
  ptx::mbarrier_expect_bytes(at.full(), L::kSlotBytes + (SCALES ? L::kScaleBytes : 0));
  load_operand<C, C::ROWS_K_MAJOR, C::ROWS, C::ROWS_ONCE>(at.rows(), *in.rows, at.full(), tile.row, k,
                                                          tile.batch * in.batched_rows);
  load_operand<C, C::COLS_K_MAJOR, C::COLS, C::COLS_ONCE>(at.cols(), *in.cols, at.full(), tile.col, k,
                                                          tile.col_batch * in.batched_cols);
  if constexpr (SCALES) {
    load_scales<C>(at, in, tile, k / C::BLOCK_K);
    at.advance_scales();
  }
  at.advance();
}

// Producer side, one thread. `record` is published with the first block.
//
// Hazard: TMA boxes begin at multiples of 16 bytes, those of scales at every fourth block of k; others fault.
template <class C, class... Record>
__device__ __forceinline__ void load_blocks(Position<C>& at, const Operands& in, const Tile& tile,
                                            Record... record) {
  ptx::mbarrier_wait(at.empty(), at.phase ^ 1);
  publish_tile<C>(at, record..., tile.half);
  if constexpr (Layout<C>::kQuads) {
    const int partial = (tile.k_end - tile.k_begin) % kQuad, whole_end = tile.k_end - partial;
    if (partial > 0) {
      load_block<C, true>(at, in, tile, whole_end);
#pragma unroll 1
      for (int kb = whole_end + 1; kb < tile.k_end; ++kb) load_block<C, false>(at, in, tile, kb);
      pass_on<C>(at, kQuad - partial);
    }
#pragma unroll 1
    for (int kb = tile.k_begin; kb < whole_end; kb += kQuad) {
      load_block<C, true>(at, in, tile, kb);
#pragma unroll
      for (int j = 1; j < kQuad; ++j) load_block<C, false>(at, in, tile, kb + j);
    }
  } else {
#pragma unroll 4
    for (int kb = tile.k_begin; kb < tile.k_end; ++kb) load_block<C, Layout<C>::kSliced>(at, in, tile, kb);
  }
}

// Producer side, for a tile without any k.
template <class C>
__device__ __forceinline__ void publish_empty_tile(Position<C>& at, int row, int packed, bool half) {
  ptx::mbarrier_wait(at.empty(), at.phase ^ 1);
  publish_tile<C>(at, row, packed, 0, half);
  pass_on<C>(at, kEmptySlots<C>);
}

// Producer side, after the last tile.
template <class C>
__device__ __forceinline__ void publish_end(const Position<C>& at) {
  ptx::mbarrier_wait(at.empty(), at.phase ^ 1);
  publish_tile<C>(at, kNoTile, 0, 0, false);
  ptx::mbarrier_arrive(at.full());
}

}  // namespace jdg
