// FP8 with scales for 32 of k, which is one instruction along k: the product of each instruction goes to an
// accumulator of its own and is promoted from there, acc += (scale of the row * scale of the column) *
// product, k ascending. Scales of a row or a column (kVector32), or of 32 of them (kBlock32).
//
// clang-format off
//   begin()    issue the first TOGETHER instructions of block 0
//                                     -- epilogue of the tile before --
//   finish()   for each block kb, each part of 64 rows, each TOGETHER of its four instructions:
//                issue them, unless begin() has done it
//                load scales of rows and of blocks    |  while the tensor
//                the last ones: wait full[kb + 1]     |  core is busy
//                wait for the products
//                the last ones: release slot kb
//                promote, scales of columns being read on the way
// clang-format on
//
// TOGETHER: 4, 2 or 1 products at a time, as many as registers allow. A wait costs about 100 cycles beside
// the promotion, which takes as many issue slots (a multiplication and addition for each element) as the
// tensor core takes cycles for an instruction, and twice as many where both scales are vectors. So issue
// slots are what large products are bound by, and other warpgroups multiply meanwhile.
//
// Hazard: scales are read behind the release of their slot, as their ring allows (ring.cuh).
#pragma once

#include <jax_deepgemm/gemm/consumer.cuh>

namespace jdg {

// Products that are held at a time.
template <class C>
constexpr int kTogether = (kParts<C> + 4) * kCols<C> / 2 + 40 <= C::REGISTERS   ? 4
                          : (kParts<C> + 2) * kCols<C> / 2 + 40 <= C::REGISTERS ? 2
                                                                                : 1;

// Neighbouring scales.
__device__ __forceinline__ void load_scales_of(float (&to)[4], u32 at) {
  const float4 v = ptx::load_shared_4(at);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
__device__ __forceinline__ void load_scales_of(float (&to)[2], u32 at) {
  const float2 v = ptx::load_shared_2(at);
  to[0] = v.x, to[1] = v.y;
}
__device__ __forceinline__ void load_scales_of(float (&to)[1], u32 at) { to[0] = ptx::load_shared(at); }

template <class C>
struct FineLoop : BegunLoop<C, kTogether<C>> {
  using L = Layout<C>;
  using Base = BegunLoop<C, kTogether<C>>;
  using Base::acc, Base::ring, Base::warpgroup, Base::mine, Base::temp, Base::Base;

  static constexpr int kCount = kTogether<C>, kSums = kCols<C> / 2;
  static constexpr int kRuns = L::kColVector ? 1 : kCols<C> / 32;  // of columns that share scales of blocks
  using Scales = float[kCount];
  static_assert(kStepsPerBlock == L::kScalesOfBlock && C::PASSES == 1 && !C::MASK_K && !C::WHOLE_BLOCKS);

  // Where a block's scales are; those of the thread's first row of a part, and of its first column.
  struct Places {
    u32 rows, cols;
  };
  __device__ __forceinline__ Places places() const {
    const int row = 64 * first_part<C>(warpgroup) + mine.row, col = first_col<C>(warpgroup);
    return {L::kRowVector ? ring.row_scales() + row * 16 : ring.block_scales() + row / 32 * 16,
            L::kColVector ? ring.col_scales() + (col + mine.col) * 16 : ring.block_scales() + col / 32 * 16};
  }

  __device__ __forceinline__ float (&products())
      [kCount][kSums] { return reinterpret_cast<float (&)[kCount][kSums]>(temp); }

  // Products of a part's instructions from `first` on.
  __device__ __forceinline__ void issue(const Slot<C>& operands, int part, int first) {
    ptx::pin(temp);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int k = (first + i) * 32;
      C::Mma::issue(products()[i], operands.rows.plus(part * Slot<C>::kSlabBytes + k), operands.cols.plus(k),
                    false);
    }
    ptx::wgmma_commit();
  }

  // A block of k; `more`: whether another one follows. BEGUN: its first products are on their way.
  template <bool BEGUN>
  __device__ __forceinline__ void multiply(bool more) {
    const Slot<C> operands(ring, warpgroup);
    const u32 empty = ring.empty();
    const Places at = places();
#pragma unroll
    for (int i = 0; i < kParts<C> * (kStepsPerBlock / kCount); ++i) {
      const int part = i / (kStepsPerBlock / kCount), first = i % (kStepsPerBlock / kCount) * kCount;
      const bool final = i + 1 == kParts<C> * (kStepsPerBlock / kCount);
      if (!BEGUN || i > 0) issue(operands, part, first);

      Scales upper, lower, upper_runs[kRuns], lower_runs[kRuns];
      load_scales_of(upper, at.rows + (L::kRowVector ? part * 64 : part * 2) * 16 + first * 4);
      if constexpr (L::kRowVector) load_scales_of(lower, at.rows + (part * 64 + 8) * 16 + first * 4);
      if constexpr (!L::kColVector) combine(upper_runs, lower_runs, upper, lower, at.cols + first * 4);
      if (final) {
        ring.advance();
        ring.advance_scales();
        if (more) ring.wait_full();
      }
      ptx::wgmma_wait<0>();
      ptx::pin(temp);
      if (final) ring.release(empty);
      if constexpr (L::kColVector)
        promote_columns(acc[part], upper, L::kRowVector ? lower : upper, at.cols + first * 4);
      else
        promote_runs(acc[part], upper_runs, lower_runs);
    }
  }

  // Scales of rows times those of 32 columns each.
  __device__ __forceinline__ static void combine(Scales (&uppers)[kRuns], Scales (&lowers)[kRuns],
                                                 const Scales& upper, const Scales& lower, u32 cols) {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      Scales block;
      load_scales_of(block, cols + run * 16);
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        uppers[run][j] = upper[j] * block[j], lowers[run][j] = lower[j] * block[j];
    }
  }

  __device__ __forceinline__ void promote_runs(float (&sums)[kSums], const Scales (&uppers)[kRuns],
                                               const Scales (&lowers)[kRuns]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] += (i % 4 < 2 ? uppers : lowers)[i / 16][j] * products()[j][i];
  }

  __device__ __forceinline__ void promote_columns(float (&sums)[kSums], const Scales& upper,
                                                  const Scales& lower, u32 cols) {
#pragma unroll
    for (int i = 0; i < kSums; i += 4) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        Scales col;
        load_scales_of(col, cols + (i * 2 + side) * 16);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          sums[i + side] += upper[j] * col[j] * products()[j][i + side];
          sums[i + side + 2] += lower[j] * col[j] * products()[j][i + side + 2];
        }
      }
    }
  }

  // --- a tile ---
  __device__ __forceinline__ void begin(const Tile&) {
    ring.wait_full();
    issue(Slot<C>(ring, warpgroup), 0, 0);
    __syncwarp();  // as in Fp8Loop
  }

  __device__ __forceinline__ void finish(const Tile& tile) {
    multiply<true>(tile.k_begin + 1 < tile.k_end);
#pragma unroll 1
    for (int kb = tile.k_begin + 1; kb < tile.k_end; ++kb) multiply<false>(kb + 1 < tile.k_end);
  }
};

}  // namespace jdg
