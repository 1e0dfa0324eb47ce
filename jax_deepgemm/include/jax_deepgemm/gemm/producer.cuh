// The producer's side of a GEMM: which tile comes next, and its blocks of k into the slots of the ring.
//
// clang-format off
//   load_blocks, FP8, 6 blocks of k                slot  s     s+1    s+2    s+3    s+4    s+5    s+6    s+7
//     the quad that lacks blocks comes first             k 4   k 5    -      -      k 0    k 1    k 2    k 3
//     a quad's scales come with its first block          4..5                       0..3
//     the tile's record comes with its first slot        tile
//   kBlockSlices                                       k 5    k 4    -      -      k 3    k 2    k 1    k 0
//     so that the block in which a group ends is the first
// clang-format on
//
// One thread does all this, or where an index names rows a warpgroup (gather.cuh): then one thread of it
// loads through TMA and writes records, and all copy rows. Tiles without any k (a group's zeros) take slots
// without data, as many as keep quads where they belong.
#pragma once

#include <jax_deepgemm/gemm/gather.cuh>
#include <jax_deepgemm/ptx/tma.cuh>

namespace jdg {

// The part of the product that a block of threads computes at a time.
struct Tile {
  int row, col, batch;
  int k_begin, k_end;       // blocks of k; FP8 begins at a multiple of four
  int col_batch = batch;    // of the cols operand
  int k_first = 0;          // where block 0 begins; a multiple of 128 for FP8
  int k_skip = 0;           // elements of the first block that do not count, and ...
  int k_stop = 0x7FFFFFFF;  // ... elements of the last block up to which they count
  bool half = false;        // only the first half of the columns, the first of two passes; all are loaded
  int index_end = 0;        // where the group's part of the index ends
};

// The same with the rows that an index names.
template <class C>
struct IndexedTile : Tile {
  RowSources<C> sources;
  __device__ __forceinline__ IndexedTile(const Tile& tile, const Indexed& from)
      : Tile(tile), sources(from, tile.row, tile.index_end) {}
};

// Whether this thread is the one that loads through TMA, by all threads that produce.
template <class C>
__device__ __forceinline__ bool leads() {
  if constexpr (kByIndex<C>)
    return warp_index() % 4 == 0 && ptx::elect();
  else
    return true;
}

// In a record's place of a row: there are no more tiles.
constexpr int kNoTile = -1;

// What the producer published, with all of the tile's k, from block 0 on.
template <class C>
__device__ __forceinline__ Tile receive_tile(const Ring<C>& ring, int k_blocks) {
  const Record record = ring.template receive<C::HALVES>();
  Tile tile = {record.x, record.y, record.z, 0, k_blocks};
  if constexpr (C::HALVES) tile.half = record.flag;
  return tile;
}

// The operands in global memory. A batch coordinate is multiplied by 0 where all batches share an operand.
struct Operands {
  const TensorMap* rows;
  const TensorMap* cols;
  const TensorMap* row_scales;  // FP8 only
  const TensorMap* col_scales;  // FP8 only
  int k_blocks;
  int batched_rows, batched_cols, batched_row_scales, batched_col_scales;  // 0 or 1
  int run_blocks = 0;                                                      // RUNS: blocks of k in each
  Indexed indexed = {};                                                    // instead of a map of rows or cols
};

template <bool ONCE>
__device__ __forceinline__ void load_box(u32 slot, const TensorMap& map, u32 bar, int x, int y, int z) {
  if constexpr (ONCE)
    ptx::tma_load_once(slot, map, bar, x, y, z);
  else
    ptx::tma_load(slot, map, bar, x, y, z);
}

template <bool K_MAJOR, int EXTENT, bool ONCE>
__device__ __forceinline__ void load_operand(u32 slot, const TensorMap& map, u32 bar, int first, int k,
                                             int batch) {
  if constexpr (K_MAJOR) {
    load_box<ONCE>(slot, map, bar, k, first, batch);
  } else {
#pragma unroll
    for (int slab = 0; slab < ceil_div(EXTENT, 64); ++slab)
      load_box<ONCE>(slot + slab * 64 * kSlotRowBytes, map, bar, first + slab * 64, k, batch);
  }
}

template <class C>
__device__ __forceinline__ void load_scale_box(u32 slot, const TensorMap& map, u32 bar, int first, int kb,
                                               int batch) {
  if constexpr (Layout<C>::kByBlock)
    ptx::tma_load(slot, map, bar, first, kb, batch);
  else
    ptx::tma_load(slot, map, bar, kb * Layout<C>::kScalesOfBlock, first, batch);
}

// A tile's columns, or their scales, of a map [batch, gate or up, feature, k]: both halves in one box.
template <bool ONCE>
__device__ __forceinline__ void load_gated(u32 slot, const TensorMap& map, u32 bar, int k, int feature,
                                           int batch) {
  if constexpr (ONCE)
    ptx::tma_load_once(slot, map, bar, k, feature, 0, batch);
  else
    ptx::tma_load(slot, map, bar, k, feature, 0, batch);
}

// Where the scales of a tile's columns begin.
template <class C>
__device__ __forceinline__ int first_col_scale(const Tile& tile) {
  if constexpr (Layout<C>::kDown) return tile.col / 128 / 4 * 4;
  return Layout<C>::kColVector ? tile.col : tile.col / Layout<C>::kScaledRows;
}

// The scales of one step of blocks of k, of both operands.
template <class C>
__device__ __forceinline__ void load_scales(const Ring<C>& ring, const Operands& in, const Tile& tile,
                                            int kb) {
  using L = Layout<C>;
  if constexpr (!C::ROWS_BY_INDEX)
    load_scale_box<C>(L::kRowVector ? ring.row_scales() : ring.block_scales(), *in.row_scales, ring.full(),
                      L::kRowVector ? tile.row : tile.row / L::kScaledRows, kb,
                      tile.batch * in.batched_row_scales);
  if constexpr (C::GATED)
    load_gated<false>(ring.block_scales(), *in.col_scales, ring.full(), kb, tile.col / 2 / 128,
                      tile.col_batch * in.batched_col_scales);
  else
    load_scale_box<C>(L::kColVector ? ring.col_scales() : ring.block_scales(), *in.col_scales, ring.full(),
                      first_col_scale<C>(tile), kb, tile.col_batch * in.batched_col_scales);
}

template <class C>
__device__ __forceinline__ void publish(const Ring<C>& ring, int x, int y, int z, bool flag = false) {
  if (leads<C>()) ring.publish(x, y, z, flag);
}
template <class C>
__device__ __forceinline__ void fill_with_nothing(const Ring<C>& ring) {
  if (leads<C>()) ring.fill_with_nothing();
  if constexpr (kByIndex<C>) ring.fill_with_nothing();
}

// Slots without data.
template <class C>
__device__ __forceinline__ void pass_on(Ring<C>& ring, int slots) {
#pragma unroll 1
  for (int i = 0; i < slots; ++i) {
    ring.wait_empty();
    fill_with_nothing<C>(ring);
    ring.advance();
  }
}

// The rows, and the columns, of a block of k that begins at k.
template <class C>
__device__ __forceinline__ void load_rows(const Ring<C>& ring, const Operands& in, const Tile& tile, int k) {
  load_operand<C::ROWS_K_MAJOR, C::ROWS, C::ROWS_ONCE>(ring.rows(), *in.rows, ring.full(), tile.row, k,
                                                       tile.batch * in.batched_rows);
}
template <class C>
__device__ __forceinline__ void load_cols(const Ring<C>& ring, const Operands& in, const Tile& tile, int k) {
  if constexpr (C::GATED)
    load_gated<C::COLS_ONCE>(ring.cols(), *in.cols, ring.full(), k, tile.col / 2,
                             tile.col_batch * in.batched_cols);
  else
    load_operand<C::COLS_K_MAJOR, C::COLS, C::COLS_ONCE>(ring.cols(), *in.cols, ring.full(), tile.col, k,
                                                         tile.col_batch * in.batched_cols);
}

// What an index names of a block of k, by all threads that produce.
template <class C, bool SCALES, class T>
__device__ __forceinline__ void gather_block(const Ring<C>& ring, const Operands& in, const T& tile, int k) {
  if constexpr (C::ROWS_BY_INDEX && C::ROWS_K_MAJOR) {
    tile.sources.load(ring.rows(), in.indexed, k / C::BLOCK_K * kSlotRowBytes);
    if constexpr (SCALES) tile.sources.load_scales(ring.row_scales(), in.indexed, k / C::BLOCK_K);
  } else if constexpr (C::ROWS_BY_INDEX) {
    gather_slabs<C, C::ROWS>(ring.rows(), in.indexed, tile.row, k, tile.index_end);
  } else {
    gather_slabs<C, C::COLS>(ring.cols(), in.indexed, tile.col, k, tile.index_end);
  }
  ptx::copy_async_arrive(ring.full());
}

// One block of k into the ring's slot; with SCALES those of a whole step of blocks, too.
template <class C, bool SCALES, class T>
__device__ __forceinline__ void load_block(Ring<C>& ring, const Operands& in, const T& tile, int kb) {
  using L = Layout<C>;
  const int k = tile.k_first + kb * C::BLOCK_K;
  ring.wait_empty();
  if (leads<C>()) {
    ring.expect(L::kSlotBytes + (SCALES ? L::kScaleBytes : 0));
    if constexpr (C::RUNS) {
      static_assert(!L::kFp8, "runs have no scales");
      Tile run = tile;
      run.batch = run.col_batch = kb / in.run_blocks;
      load_rows<C>(ring, in, run, kb % in.run_blocks * C::BLOCK_K);
      load_cols<C>(ring, in, run, kb % in.run_blocks * C::BLOCK_K);
    } else {
      if constexpr (!C::ROWS_BY_INDEX) load_rows<C>(ring, in, tile, k);
      if constexpr (!C::COLS_BY_INDEX) load_cols<C>(ring, in, tile, k);
    }
    if constexpr (SCALES) load_scales<C>(ring, in, tile, k / C::BLOCK_K - (L::kDown ? kQuad - 1 : 0));
  }
  if constexpr (kByIndex<C>) gather_block<C, SCALES>(ring, in, tile, k);
  if constexpr (SCALES) ring.advance_scales();
  ring.advance();
}

// A tile's blocks of k from the last one down; scales of blocks in front of a quad's are loaded with it, also
// where these are another group's, or none, and not looked at.
template <class C, class T>
__device__ __forceinline__ void load_blocks_down(Ring<C>& ring, const Operands& in, const T& tile) {
  const int partial = (tile.k_end - tile.k_begin) % kQuad;
  int kb = tile.k_end - 1;
  if (partial > 0) {
    load_block<C, true>(ring, in, tile, kb);
#pragma unroll 1
    for (--kb; kb >= tile.k_end - partial; --kb) load_block<C, false>(ring, in, tile, kb);
    pass_on<C>(ring, kQuad - partial);
  }
#pragma unroll 1
  for (; kb >= tile.k_begin; kb -= kQuad) {
    load_block<C, true>(ring, in, tile, kb);
#pragma unroll
    for (int j = 1; j < kQuad; ++j) load_block<C, false>(ring, in, tile, kb - j);
  }
}

// A tile's blocks of k. `record`, three integers, is published with the first one.
//
// Hazard: TMA boxes begin at multiples of 16 bytes, those of scales at every fourth block of k; others fault.
template <class C, class T, class... Words>
__device__ __forceinline__ void load_blocks(Ring<C>& ring, const Operands& in, const T& tile,
                                            Words... record) {
  ring.wait_empty();
  publish<C>(ring, record..., tile.half);
  if constexpr (Layout<C>::kDown) {
    load_blocks_down<C>(ring, in, tile);
  } else if constexpr (Layout<C>::kQuads) {
    const int partial = (tile.k_end - tile.k_begin) % kQuad, whole_end = tile.k_end - partial;
    if (partial > 0) {
      load_block<C, true>(ring, in, tile, whole_end);
#pragma unroll 1
      for (int kb = whole_end + 1; kb < tile.k_end; ++kb) load_block<C, false>(ring, in, tile, kb);
      pass_on<C>(ring, kQuad - partial);
    }
#pragma unroll 1
    for (int kb = tile.k_begin; kb < whole_end; kb += kQuad) {
      load_block<C, true>(ring, in, tile, kb);
#pragma unroll
      for (int j = 1; j < kQuad; ++j) load_block<C, false>(ring, in, tile, kb + j);
    }
  } else {
#pragma unroll(kByIndex<C> ? 1 : 4)
    for (int kb = tile.k_begin; kb < tile.k_end; ++kb) load_block<C, Layout<C>::kFp8>(ring, in, tile, kb);
  }
}

// The same for the first tile of a kernel in a chain: its columns, which no kernel of the chain writes, are
// on their way before the kernel in front has finished; rows follow when it has. FP8 with quads.
//
// Hazard: a slot's barrier expects all of its bytes from the start, so it cannot complete on columns alone.
template <class C>
__device__ __forceinline__ void load_first_blocks(Ring<C>& ring, const Operands& in, const Tile& tile,
                                                  int row, int packed, int blocks) {
  using L = Layout<C>;
  static_assert(L::kQuads && !kByIndex<C>, "the order of slots, one thread that loads");
  const int partial = blocks % kQuad, slots = align_up(blocks, kQuad), early = min(slots, C::STAGES);
  // The block of k in a slot; -1: none.
  const auto block_in = [&](int slot) {
    if (partial == 0) return slot;
    return slot >= kQuad ? slot - kQuad : slot < partial ? blocks - partial + slot : -1;
  };
  ring.publish(row, packed, blocks, tile.half);
  Ring<C> ahead = ring;
#pragma unroll 1
  for (int slot = 0; slot < early; ++slot) {
    const int kb = block_in(slot);
    if (kb < 0) {
      ahead.fill_with_nothing();
    } else {
      ahead.expect(L::kSlotBytes + (slot % kQuad == 0 ? L::kScaleBytes : 0));
      load_cols<C>(ahead, in, tile, kb * C::BLOCK_K);
    }
    ahead.advance();
  }
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
#pragma unroll 1
  for (int slot = 0; slot < early; ++slot) {
    const int kb = block_in(slot);
    if (kb >= 0) {
      load_rows<C>(ring, in, tile, kb * C::BLOCK_K);
      if (slot % kQuad == 0) {
        load_scales<C>(ring, in, tile, kb);
        ring.advance_scales();
      }
    }
    ring.advance();
  }
#pragma unroll 1
  for (int slot = early; slot < slots; ++slot) {
    const int kb = block_in(slot);
    if (kb < 0)
      pass_on<C>(ring, 1);
    else if (slot % kQuad == 0)
      load_block<C, true>(ring, in, tile, kb);
    else
      load_block<C, false>(ring, in, tile, kb);
  }
}

// A tile without any k takes so many slots.
template <class C>
constexpr int kEmptySlots = Layout<C>::kFp8 ? Layout<C>::kScaleStep : 1;

template <class C>
__device__ __forceinline__ void publish_empty_tile(Ring<C>& ring, int row, int packed, bool half) {
  ring.wait_empty();
  publish<C>(ring, row, packed, 0, half);
  pass_on<C>(ring, kEmptySlots<C>);
}

// The consumers' answer to it.
template <class C>
__device__ __forceinline__ void skip_empty_tile(Ring<C>& ring) {
#pragma unroll 1
  for (int i = 0; i < kEmptySlots<C>; ++i) {
    ring.pass();
    ring.advance();
  }
}

// After the last tile.
template <class C>
__device__ __forceinline__ void publish_end(const Ring<C>& ring) {
  ring.wait_empty();
  publish<C>(ring, kNoTile, 0, 0);
  fill_with_nothing<C>(ring);
}

}  // namespace jdg
