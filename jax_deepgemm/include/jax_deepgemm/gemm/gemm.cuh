// D = A B^T (+ C) for large m: a persistent grid of tiles of ROWS x COLS, one block of threads per SM.
//
//   warpgroups 0 .. W-1   consumers: each 64 rows of the tile, 128 of 256, or half of the columns of 64
//                         (wgmma, promotion), then the epilogue, under which the next tile's first product is
//                         made (FP8)
//   behind them           a warp, or a warpgroup where it gives registers away: one thread of it is the TMA
//                         producer, a tile ahead during the epilogue
//
//   shared memory:  A[STAGES] | B[STAGES] | D slabs of each warp | scale quads of A, B | barriers | tiles
//
// PING_PONG (BF16): each of two consumer warpgroups has whole tiles, in turn, so that one multiplies while
// the other stores.
//
// Otherwise the consumer warpgroups are not ordered against each other: they drift apart by themselves until
// one promotes or stores while others multiply.
#pragma once

#include <jax_deepgemm/gemm/epilogue.cuh>

namespace jdg {

// The order of tiles: batches, stripes of `stripe` row tiles, columns, rows within the stripe.
template <class C>
__device__ __forceinline__ Tile tile_at(int index, const Problem& p, int k_blocks) {
  const int row_tiles = ceil_div(p.m, C::ROWS), col_tiles = ceil_div(p.n, C::COLS);
  const int batch = index / (row_tiles * col_tiles), rest = index % (row_tiles * col_tiles);
  const int stripe = rest / (p.stripe * col_tiles), within = rest % (p.stripe * col_tiles);
  const int height = min(p.stripe, row_tiles - stripe * p.stripe);
  return {(stripe * p.stripe + within % height) * C::ROWS, within / height * C::COLS, batch, 0, k_blocks};
}

template <class C>
__device__ __forceinline__ void gemm(const Operands& in, const Problem& p, const TensorMap* d_map,
                                     typename C::Out* d, const typename C::Out* c) {
  extern __shared__ __align__(1024) char shared[];
  const u32 smem = smem_address(shared);
  constexpr bool kFp8 = C::ROW_SCALES != Scale::kNone;
  const int warpgroup = warpgroup_index();

  init_barriers<C>(smem);
  ptx::wait_for_previous_kernel();
  Position<C> at(smem);

  if (warpgroup == C::WARPGROUPS) {
    if constexpr (C::WARPGROUPS > 1) ptx::lower_registers<C::PRODUCER_REGISTERS>();
    if (warp_index() % 4 == 0 && ptx::elect()) {
      const int tiles = ceil_div(p.m, C::ROWS) * ceil_div(p.n, C::COLS) * p.batches;
      for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile = tile_at<C>(index, p, in.k_blocks);
        load_blocks<C>(at, in, tile, tile.row, tile.col, tile.batch);
      }
      publish_end<C>(at);
    }
  } else {
    if constexpr (C::WARPGROUPS > 1) ptx::raise_registers<C::REGISTERS>();
    Accumulator<C> acc;
    MainLoop<C> loop(acc, at, warpgroup);
    if (warpgroup > 0) await_turn<C>(at, warpgroup);
    Tile tile = receive_tile<C>(at, in.k_blocks);
    loop.begin(tile);
    while (tile.row != kNoTile) {
      const int first_row = tile.row + first_part<C>(warpgroup) * 64;
      tile.col += first_col<C>(warpgroup);
#pragma unroll
      for (int part = 0; part < kParts<C>; ++part) {
        if constexpr (C::ADD && kFp8)
          add_c<C, true>(acc[part], matrix_of(c, p, tile.batch * p.batched_c), p, tile,
                         first_row + part * 64);
        else
          clear(acc[part]);
      }
      loop.finish(tile);

      Tile next;
      if constexpr (!C::PING_PONG) {
        next = receive_tile<C>(at, in.k_blocks);
        loop.begin(next);
      }
      const u32 slabs = smem + Layout<C>::kStaging + ptx::thread_index() / 32 * C::SLABS * kSlabBytes;
#pragma unroll
      for (int part = 0; part < kParts<C>; ++part)
        store_tile<C>(acc[part], d_map, matrix_of(d, p, tile.batch),
                      matrix_of(c, p, tile.batch * p.batched_c), slabs, p, tile, first_row + part * 64);
      if constexpr (C::PING_PONG) {
        await_turn<C>(at, warpgroup);
        next = receive_tile<C>(at, in.k_blocks);
      }
      tile = next;
    }
    pass_turn<C>(at, warpgroup);  // the other may have left: nobody waits for the second of these
    loop.drop();
    // The block's memory outlives its readers.
    if (C::TMA_STORE) ptx::tma_store_wait_read();
  }
}

}  // namespace jdg
