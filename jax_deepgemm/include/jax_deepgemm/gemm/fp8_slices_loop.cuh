// FP8 with both operands' scales stored by block of k: a factor for every element. The order of work is that
// of fp8_loop.cuh, except that a slot may be masked before it is multiplied (MASK_K), and that every block of
// k has scales of its own.
#pragma once

#include <jax_deepgemm/gemm/consumer.cuh>

namespace jdg {

template <class C>
struct SlicedLoop : BegunLoop<C> {
  using BegunLoop<C>::acc, BegunLoop<C>::ring, BegunLoop<C>::warpgroup, BegunLoop<C>::BegunLoop;
  using BegunLoop<C>::mine, BegunLoop<C>::temp;

  static_assert(!kByIndex<C>, "begin() passes no proxy fence");

  // Of this thread's pairs of column scales, those that it holds through all parts.
  static constexpr int kPairs = kCols<C> / 8;
  static constexpr int kHeld = kParts<C> > 1 ? smaller(kPairs, kSpare<C> / 2) : 0;

  // WHOLE_BLOCKS: instructions along k for the last block of the tile; its first block is issued before the
  // tile is entered, so a tile of one block is known from `single`. A warp agrees on them (whole_warp says
  // why the compiler must know).
  int tail = kStepsPerBlock;
  bool single = false;

  __device__ __forceinline__ void begin(const Tile& tile) {
    mask_slot<C>(ring, tile, tile.k_begin, warpgroup);
    if constexpr (C::WHOLE_BLOCKS) {
      tail = __shfl_sync(0xFFFFFFFF, ceil_div(tile.k_stop, 32), 0);
      single = __shfl_sync(0xFFFFFFFF, tile.k_begin + 1 == tile.k_end, 0);
      if (single)
        issue<true>(Slot<C>(ring, warpgroup), 0);
      else
        issue<false>(Slot<C>(ring, warpgroup), 0);
    } else {
      issue<false>(Slot<C>(ring, warpgroup), 0);
    }
    __syncwarp();  // as in Fp8Loop
  }

  // LAST: of a tile's last block, with WHOLE_BLOCKS. Other blocks must not pay for its branches.
  template <bool LAST>
  __device__ __forceinline__ void issue(const Slot<C>& operands, int part) {
    ptx::pin(temp);
    ptx::wgmma_fence();
    if (!LAST || tail == kStepsPerBlock)
      operands.multiply(temp, true, part);
    else if (tail == 1)
      operands.template multiply<1>(temp, true, part);
    else if (tail == 2)
      operands.template multiply<2>(temp, true, part);
    else
      operands.template multiply<3>(temp, true, part);
    ptx::wgmma_commit();
  }

  // The block of which the first part's product is on its way. `more`: whether a block follows.
  template <bool LAST = false>
  __device__ __forceinline__ void promote(bool more) {
    const Slot<C> operands(ring, warpgroup);
    const u32 empty = ring.empty(), cols = ring.col_scales() + (first_col<C>(warpgroup) + mine.col) * 4;
    const u32 rows = ring.row_scales() + (64 * first_part<C>(warpgroup) + mine.row) * 4;
    float2 held[kHeld > 0 ? kHeld : 1];
#pragma unroll
    for (int part = 0; part < kParts<C>; ++part) {
      if (part > 0) issue<LAST>(operands, part);
      const float upper = ptx::load_shared(rows + part * 64 * 4);
      const float lower = ptx::load_shared(rows + (part * 64 + 8) * 4);
#pragma unroll
      for (int i = 0; part == 0 && i < kHeld; ++i) held[i] = ptx::load_shared_2(cols + i * 8 * 4);
      const bool final = part + 1 == kParts<C>;
      if (final) {
        ring.advance();
        ring.advance_scales();
        if (more) ring.wait_full();
      }

      ptx::wgmma_wait<0>();
      ptx::pin(temp);
      if (final) ring.release(empty);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float2 scale = i < kHeld ? held[i] : ptx::load_shared_2(cols + i * 8 * 4);
        const float* product = temp + 4 * i;
        float* to = acc[part] + 4 * i;
        to[0] += scale.x * (product[0] * upper);
        to[2] += scale.x * (product[2] * lower);
        to[1] += scale.y * (product[1] * upper);
        to[3] += scale.y * (product[3] * lower);
      }
    }
  }

  __device__ __forceinline__ void next(const Tile& tile, int kb) {
    mask_slot<C>(ring, tile, kb, warpgroup);
    issue<false>(Slot<C>(ring, warpgroup), 0);
  }

  __device__ __forceinline__ void finish(const Tile& tile) {
    if constexpr (C::WHOLE_BLOCKS) {
      if (!single) {
        promote(true);
#pragma unroll 1
        for (int kb = tile.k_begin + 2; kb < tile.k_end; ++kb) {
          next(tile, kb);
          promote(true);
        }
        issue<true>(Slot<C>(ring, warpgroup), 0);
      }
      promote<true>(false);
    } else {
      promote(tile.k_begin + 1 < tile.k_end);
#pragma unroll 1
      for (int kb = tile.k_begin + 1; kb < tile.k_end; ++kb) {
        next(tile, kb);
        promote(kb + 1 < tile.k_end);
      }
    }
  }
};

}  // namespace jdg
