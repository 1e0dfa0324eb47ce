// The skeleton of a kernel whose blocks of threads, one per SM, walk over tiles of ROWS x COLS. What the
// tiles are is the caller's: those of a matrix (gemm.cuh) or of groups (grouped/gemm_grouped.cuh).
//
// clang-format off
//   warpgroups 0 .. W-1    consumers: each its share of a tile, 64 rows of it or more, or half of its columns
//   behind them            a warp, or a warpgroup where it gives registers away: one thread of it is the
//                          producer (all, where an index names rows), a tile ahead during the epilogue
//
//   producer:    for each tile of this block:  produce (record, blocks of k)          then kNoTile
//   consumer:    receive, begin
//                until kNoTile:
//                  multiply                    start the accumulator, finish
//                  receive, begin              the next tile, whose first product (FP8) is made during ...
//                  store                       ... the epilogue
// clang-format on
//
// PING_PONG (BF16): each of two consumer warpgroups has whole tiles, in turn, so that one multiplies while
// the other stores. It waits for its turn after it has stored, and only then receives the next tile.
//
// Otherwise the consumer warpgroups are not ordered against each other: they drift apart by themselves until
// one promotes or stores while others multiply.
#pragma once

#include <jax_deepgemm/gemm/epilogue.cuh>

namespace jdg {

// clang-format off
// What the skeleton asks of Tiles. `Work` is what a consumer keeps of a tile.
//   void prepare(u32 smem)                        by all threads, once; behind it they may touch memory
//   void produce(Ring<C>& ring) const             by the producer: all tiles of this block, in order
//   Work receive(const Ring<C>& ring) const       by consumers: the next one; Work::row is kNoTile at the end
//   Tile range(const Work&) const                 what MainLoop::begin must know: where its k begins and ends
//   void multiply(MainLoop<C>&, Work&) const      starts the accumulator, and adds the tile's product
//   void store(MainLoop<C>&, const Work&) const   the accumulator to D
// clang-format on
template <class C, class Tiles>
__device__ __forceinline__ void persistent(Tiles tiles) {
  extern __shared__ __align__(1024) char shared[];
  const u32 smem = smem_address(shared);
  const int warpgroup = warpgroup_index();

  init_barriers<C>(smem);
  tiles.prepare(smem);
  Ring<C> ring(smem);

  if (warpgroup == C::WARPGROUPS) {
    if constexpr (C::WARPGROUPS > 1) ptx::lower_registers<C::PRODUCER_REGISTERS>();
    if (kByIndex<C> || (warp_index() % 4 == 0 && ptx::elect())) {
      tiles.produce(ring);
      publish_end<C>(ring);
      if constexpr (kByIndex<C>) ptx::copy_async_wait();
    }
  } else {
    if constexpr (C::WARPGROUPS > 1) ptx::raise_registers<C::REGISTERS>();
    Accumulator<C> acc;
    MainLoop<C> loop(acc, ring, warpgroup);
    if (warpgroup > 0) ring.await_turn(warpgroup);
    auto work = tiles.receive(ring);
    loop.begin(tiles.range(work));
    while (work.row != kNoTile) {
      tiles.multiply(loop, work);
      if constexpr (C::PING_PONG) {
        tiles.store(loop, work);
        ring.await_turn(warpgroup);
        work = tiles.receive(ring);
      } else {
        const auto next = tiles.receive(ring);
        loop.begin(tiles.range(next));
        tiles.store(loop, work);
        work = next;
      }
    }
    ring.pass_turn(warpgroup);  // the other may have left: nobody waits for the second of these
    loop.drop();
    // The block's memory outlives its readers.
    if (C::TMA_STORE) ptx::tma_store_wait_read();
  }
}

}  // namespace jdg
