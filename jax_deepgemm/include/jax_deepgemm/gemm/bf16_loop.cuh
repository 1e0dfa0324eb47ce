// BF16: one accumulator over all of k. While one block of k is multiplied the next one is issued behind it.
//
// clang-format off
//   for each block kb:   wait full[kb]   issue product kb   wait for product kb - 1   release slot kb - 1
//   after the last:      hand the turn on (ping-pong)       wait for the last product, release its slot
// clang-format on
#pragma once

#include <jax_deepgemm/gemm/consumer.cuh>

namespace jdg {

template <class C>
struct Bf16Loop : PlainLoop<C> {
  using PlainLoop<C>::acc, PlainLoop<C>::ring, PlainLoop<C>::warpgroup, PlainLoop<C>::PlainLoop;

  __device__ __forceinline__ void pin() {
#pragma unroll
    for (int part = 0; part < kParts<C>; ++part) ptx::pin(acc[part]);
  }
  __device__ __forceinline__ void skip() {
    skip_empty_tile<C>(ring);
    ring.pass_turn(warpgroup);
  }

  __device__ __forceinline__ void finish(const Tile& tile) {
    u32 previous = 0;
    pin();
    for (int kb = tile.k_begin; kb < tile.k_end; ++kb) {
      ring.wait_full();
      mask_slot<C>(ring, tile, kb, warpgroup);
      ptx::wgmma_fence();
#pragma unroll
      for (int part = 0; part < kParts<C>; ++part) Slot<C>(ring, warpgroup).multiply(acc[part], false, part);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (kb > tile.k_begin) ring.release(previous);
      previous = ring.empty();
      ring.advance();
    }
    ring.pass_turn(warpgroup);
    ptx::wgmma_wait<0>();
    pin();
    if (tile.k_begin < tile.k_end) ring.release(previous);
  }
};

}  // namespace jdg
