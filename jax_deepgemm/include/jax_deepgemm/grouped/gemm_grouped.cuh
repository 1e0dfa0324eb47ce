// Grouped GEMMs: a persistent grid over the tiles of all groups, whose sizes are only known on the device.
//
// clang-format off
//   warp 0                group_sizes -> table of segments in shared memory (group_table.cuh), then all wait
//   warpgroups 0 .. W-1   consumers, as in persistent.cuh: multiply, promote, epilogue
//   behind them           the TMA producer: tile number -> segment -> rows, k range; where an index names
//                         rows, a warpgroup that copies them (gemm/gather.cuh)
//
//   rows in groups:  tiles begin at each group's first row, whatever it is. Rows of the last tile beyond
//                    the group are multiplied and not stored; rows beyond all groups are stored as zeros.
//   k in groups:     every D[i] has all its tiles. What a slot holds beside the group's range of k is
//                    zeroed in shared memory, in both operands (mask_slot).
//
//   shared memory:   ring.cuh
// clang-format on
//
// CHAINED: a kernel of a chain of launches (programmatic dependent launch), of which all kernels but the one
// right before have finished when it starts: what gave the group sizes is among these. So the table is made
// and the first tile's columns are loaded at once, beside the tail of that kernel. Only the producer waits
// for it, before it loads rows: nothing else that is read here comes from it, and D is read by later kernels
// only.
#pragma once

#include <jax_deepgemm/gemm/gemm.cuh>
#include <jax_deepgemm/grouped/group_table.cuh>

namespace jdg {

// A condition that is the same for all threads of a warp. The compiler cannot know that of a value read from
// the table, and the shuffle tells it. Otherwise it would assume that threads diverge at a branch around the
// main loop: it would compute descriptors in vector registers (R2UR) and synchronise the warp before each
// multiplication (WARPSYNC), some 30 instructions more for each block of k.
__device__ __forceinline__ bool whole_warp(bool condition) { return __shfl_sync(0xFFFFFFFF, condition, 0); }

// Which tile: what the producer publishes and consumers keep; it comes by shuffle, so a warp agrees on it.
// The rest is read from the table where it is needed, because no registers are free beside an accumulator.
struct TileRecord {
  static constexpr int kIndexBits = 12;  // ops/grouped/sm90/rules.py allows no more segments
  int row, packed, blocks;
  bool half;

  __device__ __forceinline__ int index() const { return packed & ((1 << kIndexBits) - 1); }
  __device__ __forceinline__ int col() const { return (packed >> kIndexBits) * 8; }
};

struct GroupTile {
  Tile tile;
  int rows_end;   // rows up to here hold products, ...
  int zeros_end;  // ... and up to here zeros; what is beyond belongs to others
};

template <class C>
__device__ __forceinline__ GroupTile group_tile(const GroupTable<C>& table, const TileRecord& at,
                                                const Extents& p, int k_blocks) {
  const Segment s = table[at.index()];
  GroupTile out{{at.row, at.col(), at.index(), 0, 0, s.group}, p.m, p.m};
  Tile& tile = out.tile;
  tile.half = at.half;
  if constexpr (GroupTable<C>::kInner) {
    tile.k_first =
        Layout<C>::kFp8 ? s.start / 128 * 128 : s.start;  // blocks of scales are those of the operand
    tile.k_skip = s.start - tile.k_first;
    tile.k_end = s.end > s.start ? ceil_div(s.end - tile.k_first, C::BLOCK_K) : 0;
    tile.k_stop = s.end - tile.k_first - (tile.k_end - 1) * C::BLOCK_K;
    tile.index_end = s.end;
  } else {
    out.rows_end = s.group >= 0 ? s.end : s.start;
    // Rows of a masked group behind its last one may hold anything, so its last warp need not stop at it.
    out.zeros_end = GroupTable<C>::kRowsInGroups ? table.word(at.index() + 1, 0)
                    : C::ZERO_ROWS               ? p.m
                                                 : min(align_up(s.end, 16), p.m);
    tile.k_end = at.row < out.rows_end ? k_blocks : 0;
    tile.index_end = out.rows_end;
  }
  return out;
}

// What is computed, in rounds of one tile for each block of threads. If the last round would leave half of
// the blocks idle, its tiles are cut in two (HALVES).
template <class C>
struct Rounds {
  int tiles, whole;  // numbers from `whole` on are halves

  __device__ __forceinline__ explicit Rounds(int tiles) : tiles(tiles), whole(tiles) {
    const int rest = tiles % gridDim.x;
    if (C::HALVES && 2 * rest <= gridDim.x) whole -= rest;
  }
  __device__ __forceinline__ int count() const { return C::HALVES ? 2 * tiles - whole : tiles; }
  __device__ __forceinline__ bool half(int number) const { return C::HALVES && number >= whole; }
  __device__ __forceinline__ int tile(int number) const {
    return half(number) ? whole + (number - whole) / 2 : number;
  }
  // The first column of a half within its tile.
  __device__ __forceinline__ int shift(int number) const {
    return half(number) ? (number - whole) % 2 * (C::COLS / 2) : 0;
  }
};

// Where the tile of a round lies, in the order of gemm.cuh within a segment.
template <class C>
__device__ __forceinline__ TileRecord nth_tile(const GroupTable<C>& table, const Rounds<C>& rounds,
                                               int number, const Extents& p) {
  const int tile = rounds.tile(number), index = table.find(tile);
  Extents mine = p;
  mine.m = covered_rows(table, index, p);
  const Tile within = tile_at<C>(tile - table.word(index, 2), mine, 0);
  const int row = (GroupTable<C>::kRowsInGroups ? table.word(index, 0) : 0) + within.row;
  const int col = within.col + rounds.shift(number);
  return {row, col / 8 << TileRecord::kIndexBits | index, 0, rounds.half(number)};
}

template <class C>
__device__ __forceinline__ void clear_rows_from(float (&acc)[kCols<C> / 2], int first_row, int rows_end) {
  if (first_row + 64 <= rows_end) return;
  const Fragment mine;
  const bool upper = first_row + mine.row < rows_end, lower = first_row + mine.row + 8 < rows_end;
#pragma unroll
  for (int i = 0; i < kCols<C> / 2; ++i) acc[i] = (i / 2 % 2 ? lower : upper) ? acc[i] : 0.0f;
}

// A warp's 16 rows go out whole through TMA where they all belong to this tile, else row by row.
template <class C>
__device__ __forceinline__ void store_group_tile(float (&acc)[kCols<C> / 2], const TensorMap* d_map,
                                                 typename C::Out* d, const typename C::Out* c, u32 slabs,
                                                 const Extents& p, const GroupTile& mine, int first_row) {
  const int warp_row = first_row + ptx::thread_index() / 32 % 4 * 16;
  if (whole_warp(warp_row >= mine.zeros_end)) return;
  if (C::REDUCE && whole_warp(mine.tile.k_end == 0)) return;
  const bool cut = whole_warp(warp_row + 16 > mine.zeros_end && mine.zeros_end < p.m);
  Tile tile = mine.tile;
  if constexpr (GroupTable<C>::kRowsInGroups) tile.batch = 0;
  Extents bounded = p;
  bounded.m = mine.zeros_end;
  typename C::Out* out = matrix_of<C>(d, p, tile.batch);
  if (C::TMA_STORE && cut)
    store_direct<C>(acc, out, bounded, tile, first_row);
  else
    store_tile<C>(acc, d_map, out, matrix_of<C>(c, p, tile.batch), slabs, bounded, tile, first_row);
}

template <class C, class E = AsItIs>
struct GroupedTiles {
  using Work = TileRecord;
  const Operands in;
  const Groups groups;
  const Extents p;
  const TensorMap* d_map;
  typename C::Out* d;
  const typename C::Out* c;
  const E finish;
  GroupTable<C> table;

  __device__ __forceinline__ void prepare(u32 smem) {
    if constexpr (!C::CHAINED) ptx::wait_for_previous_kernel();
    table = make_table<C>(groups, p, smem + Layout<C>::kTable);
  }

  // The first tile of a kernel in a chain, if there is one and it has products; the number of the next one.
  __device__ __forceinline__ int produce_first(Ring<C>& ring, const Rounds<C>& rounds) const {
    const int number = blockIdx.x;
    if (number < rounds.count()) {
      const TileRecord first = nth_tile<C>(table, rounds, number, p);
      const Tile tile = group_tile<C>(table, first, p, in.k_blocks).tile;
      if (tile.k_end > 0) {
        load_first_blocks<C>(ring, in, tile, first.row, first.packed, tile.k_end);
        return number + gridDim.x;
      }
    }
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();
    return number;
  }

  __device__ __forceinline__ void load(Ring<C>& ring, const Tile& tile, const TileRecord& at) const {
    if constexpr (C::ROWS_BY_INDEX && C::ROWS_K_MAJOR)
      load_blocks<C>(ring, in, IndexedTile<C>(tile, in.indexed), at.row, at.packed, tile.k_end);
    else
      load_blocks<C>(ring, in, tile, at.row, at.packed, tile.k_end);
  }

  __device__ __forceinline__ void produce(Ring<C>& ring) const {
    const Rounds<C> rounds(table.tiles);
    int first = blockIdx.x;
    if constexpr (C::CHAINED) first = produce_first(ring, rounds);
    for (int number = first; number < rounds.count(); number += gridDim.x) {
      const TileRecord next = nth_tile<C>(table, rounds, number, p);
      const Tile tile = group_tile<C>(table, next, p, in.k_blocks).tile;
      if (tile.k_end > 0)
        load(ring, tile, next);
      else
        publish_empty_tile<C>(ring, next.row, next.packed, next.half);
    }
  }

  __device__ __forceinline__ TileRecord receive(const Ring<C>& ring) const {
    const Tile record = receive_tile<C>(ring, 0);
    return {record.row, record.col, record.batch, record.half};
  }

  // FP8 masks a slot before it begins, so it must know more of a tile than its record.
  __device__ __forceinline__ Tile range(const TileRecord& at) const {
    if constexpr (GroupTable<C>::kInner && Layout<C>::kFp8)
      if (at.row != kNoTile) return group_tile<C>(table, at, p, 0).tile;
    return {};
  }

  __device__ __forceinline__ void multiply(MainLoop<C>& loop, const TileRecord& record) const {
    Tile tile = group_tile<C>(table, record, p, in.k_blocks).tile;
    tile.col += first_col<C>(loop.warpgroup);
    start_accumulator<C>(loop.acc, matrix_of<C>(c, p, tile.batch), p, tile,
                         record.row + first_part<C>(loop.warpgroup) * 64);
    if (record.blocks > 0) {
      tile.k_end = GroupTable<C>::kInner ? record.blocks : in.k_blocks;  // the latter needs no register
      loop.finish(tile);
    } else {
      loop.skip();
    }
  }

  // The index of the warpgroup is read anew, because of the accumulator (ptx::thread_index).
  __device__ __forceinline__ void store(MainLoop<C>& loop, const TileRecord& record) const {
    GroupTile mine = group_tile<C>(table, record, p, in.k_blocks);
    mine.tile.col += first_col<C>(ptx::thread_index() / 128);
    const u32 slabs = slabs_of_warp<C>(loop.ring.smem);
#pragma unroll
    for (int part = 0; part < kParts<C>; ++part) {
      const int first_row = record.row + (first_part<C>(ptx::thread_index() / 128) + part) * 64;
      if constexpr (E::kChanges || E::kQuantized) {
        store_finished(loop.acc[part], slabs, mine, first_row);
      } else {
        if constexpr (!GroupTable<C>::kInner) clear_rows_from<C>(loop.acc[part], first_row, mine.rows_end);
        store_group_tile<C>(loop.acc[part], d_map, d, c, slabs, p, mine, first_row);
      }
    }
  }

  // A part of 64 rows that becomes something else first, with its group's bias, in cuts (gemm.cuh). Rows that
  // hold no products are zeros whatever the bias is.
  __device__ __forceinline__ void store_finished(float (&acc)[kCols<C> / 2], u32 slabs, const GroupTile& mine,
                                                 int first_row) const {
    using Cut = CutOf<C, kCuts<C, E>>;
    using S = Stored<E, Cut>;
    if (whole_warp(first_row + ptx::thread_index() / 32 % 4 * 16 >= mine.zeros_end)) return;
    Extents out = E::stored(p);
#pragma unroll
    for (int i = 0; i < kCuts<C, E>; ++i) {
      GroupTile cut = mine;
      cut.tile.col += i * kCols<Cut>, cut.tile.half = false;
      const bool behind = mine.tile.half && i >= kCuts<C, E> / 2;
      if (kCuts<C, E> > 1 && whole_warp(behind || cut.tile.col >= p.n)) return;
      auto& whole = reinterpret_cast<float (&)[kCols<Cut> / 2]>(acc[i * kCols<Cut> / 2]);
      finish.of(max(mine.tile.col_batch, 0), p).template apply<Cut>(whole, p, cut.tile);
      auto& stored = reinterpret_cast<float (&)[kCols<S> / 2]>(whole);
      clear_rows_from<S>(stored, first_row, mine.rows_end);
      cut.tile = E::stored(cut.tile);
      if constexpr (E::kQuantized) {
        out.m = mine.zeros_end;
        const i64 before = GroupTable<C>::kRowsInGroups ? 0 : static_cast<i64>(cut.tile.batch) * p.m;
        finish.store_quantized(stored, slabs, out, cut.tile, first_row, before);
      } else {
        store_group_tile<S>(stored, d_map, d, c, slabs, out, cut, first_row);
      }
    }
  }
};

template <class C, class E = AsItIs>
  requires GemmConfig<C> && GroupedConfig<C>
__device__ __forceinline__ void gemm_grouped(const Operands& in, const Groups& groups, const Extents& p,
                                             const TensorMap* d_map, typename C::Out* d,
                                             const typename C::Out* c, const E& finish = {}) {
  persistent<C>(GroupedTiles<C, E>{in, groups, p, d_map, d, c, finish, {}});
}

}  // namespace jdg
