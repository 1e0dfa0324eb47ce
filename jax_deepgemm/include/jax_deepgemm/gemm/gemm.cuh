// D = A B^T (+ C) for large m: the persistent kernel over the tiles of a matrix, or of a batch of them.
//
// clang-format off
// Its parts, in the order in which to read them; each includes the one before:
//   config.cuh                 what a kernel is told at compile time
//   ../pipeline.cuh            slots of shared memory between a producer and consumers
//   ring.cuh                   where in shared memory things are
//   gather.cuh                 rows that an index names (grouped products only)
//   producer.cuh               global memory to slots
//   consumer.cuh               slots to products: what all main loops have in common
//   bf16_loop.cuh, fp8_loop.cuh, fp8_slices_loop.cuh, fp8_fine_loop.cuh     the main
//                              loops; mainloop.cuh chooses
//   epilogue.cuh               accumulators to D; finish.cuh, what may become of them before
//   persistent.cuh             which warps do what, and when
// clang-format on
#pragma once

#include <jax_deepgemm/gemm/persistent.cuh>

namespace jdg {

// The order of tiles: batches, stripes of `stripe` row tiles, columns, rows within the stripe.
// BATCHES_TOGETHER: rows, batches, columns, so that blocks of threads which run at a time read whole rows of
// [row, batch, k].
template <class C>
__device__ __forceinline__ Tile tile_at(int index, const Extents& p, int k_blocks) {
  const int row_tiles = ceil_div(p.m, C::ROWS), col_tiles = ceil_div(p.n, C::COLS);
  if constexpr (C::BATCHES_TOGETHER) {
    const int row = index / (p.batches * col_tiles), batch = index / col_tiles % p.batches;
    return {row * C::ROWS, index % col_tiles * C::COLS, batch, 0, k_blocks};
  }
  const int batch = index / (row_tiles * col_tiles), rest = index % (row_tiles * col_tiles);
  const int stripe = rest / (p.stripe * col_tiles), within = rest % (p.stripe * col_tiles);
  const int height = min(p.stripe, row_tiles - stripe * p.stripe);
  return {(stripe * p.stripe + within % height) * C::ROWS, within / height * C::COLS, batch, 0, k_blocks};
}

// How many parts a warpgroup's columns are finished and stored in (`cuts` in ops/gemm/sm90/config.py): beside
// the widest accumulators no registers are left for what all columns need.
template <class C>
constexpr int kWidestCuts = C::GATED                             ? 1
                            : Layout<C>::kFp8 && kCols<C> == 256 ? 4
                            : C::PING_PONG && kCols<C> == 192    ? 3
                                                                 : 1;
template <class C, class E>
constexpr int kCuts = E::kChanges ? kWidestCuts<C> : 1;
template <class C, int CUTS>
struct CutOf : C {
  static constexpr int COLS = C::COLS / CUTS;
};
template <class C>
struct CutOf<C, 1> : C {};

template <class C, class E>
struct DenseTiles {
  using Work = Tile;
  const Operands in;
  const Extents p;
  const TensorMap* d_map;
  typename C::Out* d;
  const typename C::Out* c;
  const E finish;

  __device__ __forceinline__ void prepare(u32) { ptx::wait_for_previous_kernel(); }

  __device__ __forceinline__ void produce(Ring<C>& ring) const {
    const int tiles = ceil_div(p.m, C::ROWS) * ceil_div(p.n, C::COLS) * p.batches;
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
      const Tile tile = tile_at<C>(index, p, in.k_blocks);
      load_blocks<C>(ring, in, tile, tile.row, tile.col, tile.batch);
    }
  }

  __device__ __forceinline__ Tile receive(const Ring<C>& ring) const {
    return receive_tile<C>(ring, in.k_blocks);
  }
  __device__ __forceinline__ Tile range(const Tile& tile) const { return tile; }

  // Moves on to this warpgroup's share of the tile.
  __device__ __forceinline__ void multiply(MainLoop<C>& loop, Tile& tile) const {
    tile.row += first_part<C>(loop.warpgroup) * 64;
    tile.col += first_col<C>(loop.warpgroup);
    start_accumulator<C, E>(loop.acc, matrix_of<C>(c, p, tile.batch * p.batched_c), p, tile, tile.row);
    loop.finish(tile);
  }

  __device__ __forceinline__ void store(MainLoop<C>& loop, const Tile& tile) const {
    using Cut = CutOf<C, kCuts<C, E>>;
    using S = Stored<E, Cut>;
    const u32 slabs = slabs_of_warp<C>(loop.ring.smem);
    const Extents out = E::stored(p);
    typename C::Out* to = matrix_of<C>(d, out, tile.batch);
#pragma unroll
    for (int i = 0; i < kParts<C> * kCuts<C, E>; ++i) {
      const int part = i / kCuts<C, E>, first = i % kCuts<C, E> * kCols<Cut>, row = tile.row + part * 64;
      auto& acc = reinterpret_cast<float (&)[kCols<Cut> / 2]>(loop.acc[part][first / 2]);
      Tile cut = tile;
      cut.col += first;
      // Between parts a branch must stand, or ptxas would finish all of them before it stores the first.
      if (kCuts<C, E> > 1 && cut.col >= p.n) return;
      finish.of(tile.batch, p).template apply<Cut>(acc, p, cut);
      auto& stored = reinterpret_cast<float (&)[kCols<S> / 2]>(acc);
      if constexpr (E::kQuantized)
        finish.store_quantized(stored, slabs, out, E::stored(cut), row, static_cast<i64>(tile.batch) * out.m);
      else
        store_tile<S, E>(stored, d_map, to, matrix_of<C>(c, out, tile.batch * p.batched_c), slabs, out,
                         E::stored(cut), row);
      E::template fill_holes<Cut>(to, out, p.n, cut, row);
    }
  }
};

template <GemmConfig C, class E = AsItIs>
__device__ __forceinline__ void gemm(const Operands& in, const Extents& p, const TensorMap* d_map,
                                     typename C::Out* d, const typename C::Out* c, const E& finish = {}) {
  persistent<C>(DenseTiles<C, E>{in, p, d_map, d, c, finish});
}

}  // namespace jdg
