// FP8 with scales in quads of four blocks of k. The product of one block of k goes to an accumulator of its
// own, `temp`, and is promoted from there: acc += scales * product.
//
// clang-format off
//   begin()    issue product 0
//                                     -- epilogue of the tile before --
//   finish()   load the first quad of scales
//              for each block kb:     issue product kb, unless begin() has done it
//                                     combine its scales of rows and 128x128 blocks   |  while the tensor
//                                     wait full[kb + 1]                               |  core is busy
//                                     wait for product kb
//                                     release slot kb
//                                     promote
//                                     after a quad's last block: load the next quad of scales
//                                     kFactorsEarly: load the next block's scales of columns
// clang-format on
//
// Between two multiplications of a warpgroup stand only the promotion, the loads of a quad and the issue.
// Wide tiles are multiplied in PASSES over their columns, and high ones in parts of 64 rows. These share
// `temp`, one after the other, so each of them is a step with its own issue, wait and promotion.
//
// The first slot of a tile without any k is multiplied in begin() too, whatever it holds, and the product is
// not looked at. It may be read then, because nothing writes to a slot that is not released.
//
// WHOLE_BLOCKS (kBlockSlices): the first block is the last one of a group, and is multiplied no further than
// it counts; all others are whole.
#pragma once

#include <jax_deepgemm/gemm/consumer.cuh>

namespace jdg {

// What a configuration means for the loop: how columns are cut, and where scales wait for their promotion.
template <class C>
struct Fp8Policy {
  using L = Layout<C>;
  static constexpr int kUnit = gcd(C::STAGES, kQuad);  // blocks whose slots are neighbours
  static constexpr int kWidth = kCols<C> / C::PASSES;  // columns of a product
  static constexpr int kGroups = kWidth / 8;           // of 8 columns, of which a thread has two, in two rows
  static constexpr bool kColVector = C::COL_SCALES == Scale::kVector;
  static constexpr bool kRowVector = L::kRowVector;

  // 128x128 scales. kBlocks: how many a warpgroup's columns can touch; side by side they begin at halves of
  // blocks. kRun: neighbouring columns that share a scale wherever a tile begins, and kRuns of them.
  static constexpr int kBlocks = L::kBlocks == 0 || C::ACROSS > 1 ? 1 : L::kDown ? C::COLS / 128 : L::kBlocks;
  static constexpr int kRun = kColVector ? kCols<C> : gcd(kCols<C>, 128), kRuns = kCols<C> / kRun;

  // Scales of rows: a quad of both of a thread's rows in registers, or read block by block for several parts.
  static constexpr bool kRowsByQuad = kRowVector && kParts<C> == 1;

  // Scales of columns are a factor for every element or column. Where registers allow, factors are ready
  // before the product is (kFactorsEarly); with several parts, as many scales as registers allow are held
  // through all of them (kHeld); the others are read by promotion.
  static constexpr int kFactors = kRowVector ? kCols<C> / 2 : 2 * kGroups;
  static constexpr bool kFactorsEarly =
      kColVector && kParts<C> == 1 && kCols<C> + kFactors <= C::REGISTERS - 40;
  static constexpr int kHeld = kColVector && kParts<C> > 1 ? smaller(2 * kGroups, kSpare<C>) : 0;
  static constexpr int kColsKept = kFactorsEarly ? 2 * kGroups : kHeld;  // scales of columns in registers

  static_assert(!C::MASK_K, "begin() multiplies a slot as it is");
  static_assert(C::PASSES == 2 || !C::HALVES, "half a tile is the first of two passes");
  static_assert(C::PASSES == 1 || (!kColVector && kWidth % 128 == 0), "whole blocks");
};

template <class C>
struct Fp8Loop : BegunLoop<C> {
  using L = Layout<C>;
  using P = Fp8Policy<C>;
  using BegunLoop<C>::acc, BegunLoop<C>::ring, BegunLoop<C>::warpgroup, BegunLoop<C>::BegunLoop;
  using BegunLoop<C>::mine, BegunLoop<C>::temp;
  using Runs = float[P::kRuns];
  using Factors = float[P::kFactorsEarly ? P::kFactors : 1];

  // Scales of a quad: of this thread's two rows, and of the 128x128 blocks; of one block: of this thread's
  // columns.
  float4 upper, lower, block[P::kBlocks];
  int offset;  // the tile's first column modulo 128, or 512, whose scales lie side by side (kBlockSlices)
  float col[P::kColsKept > 0 ? P::kColsKept : 1];

  // --- scales ---
  static constexpr int kRowStep = (L::kDown ? 1 : kQuad) * 4;  // bytes from one row's scales to the next's
  __device__ __forceinline__ static float element(const float4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  }
  __device__ __forceinline__ u32 row_scales() const {
    return ring.row_scales() + (64 * first_part<C>(warpgroup) + mine.row) * kRowStep;
  }
  // Four scales of a quad that lie `apart` bytes from each other, the last block of k last.
  __device__ __forceinline__ static float4 load_down(u32 at, int apart) {
    return {ptx::load_shared(at + 3 * apart), ptx::load_shared(at + 2 * apart), ptx::load_shared(at + apart),
            ptx::load_shared(at)};
  }
  __device__ __forceinline__ void load_quad() {
    if constexpr (P::kRowsByQuad && L::kDown) {
      upper = load_down(row_scales(), C::ROWS * 4);
      lower = load_down(row_scales() + 8 * kRowStep, C::ROWS * 4);
    } else if constexpr (P::kRowsByQuad) {
      upper = ptx::load_shared_4(row_scales());
      lower = ptx::load_shared_4(row_scales() + 8 * kRowStep);
    }
#pragma unroll
    for (int i = 0; L::kBlocks > 0 && i < P::kBlocks; ++i) {
      if constexpr (L::kDown)
        block[i] = load_down(ring.block_scales() + offset / 128 * 4 + i * 4, 4 * 4);
      else
        block[i] = ptx::load_shared_4(ring.block_scales() + (first_col<C>(warpgroup) / 128 + i) * kQuad * 4);
    }
  }
  __device__ __forceinline__ float col_scale(int j, int i) const {
    const int col = first_col<C>(warpgroup) + mine.col;
    return ptx::load_shared(ring.col_scales() + col * kQuad * 4 + ((i / 2 * 8 + i % 2) * kQuad + j) * 4);
  }
  __device__ __forceinline__ void load_cols(int j) {
#pragma unroll
    for (int i = 0; i < P::kColsKept; ++i) col[i] = col_scale(j, i);
  }

  // Which of the numbers of a tile's 128-blocks is a run's.
  __device__ __forceinline__ float of_run(int run, const float (&blocks)[P::kBlocks]) const {
    float chosen = blocks[0];
#pragma unroll
    for (int b = 1; b < P::kBlocks; ++b) {
      const int least = run * P::kRun - 128 * b, most = least + 128 - P::kRun;  // without and with any offset
      if (least >= 0 || (most >= 0 && least + offset >= 0)) chosen = blocks[b];
    }
    return chosen;
  }

  // Row scales times those of the 128x128 blocks, for each run of columns.
  __device__ __forceinline__ void part_factors(int j, int part, Runs& uppers, Runs& lowers) const {
    float u = 1.0f, l = 1.0f, block_uppers[P::kBlocks], block_lowers[P::kBlocks];
    if constexpr (P::kRowsByQuad) {
      u = element(upper, j), l = element(lower, j);
    } else if constexpr (P::kRowVector) {
      const u32 address = row_scales() + part * 64 * kRowStep + (L::kDown ? (3 - j) * C::ROWS : j) * 4;
      u = ptx::load_shared(address), l = ptx::load_shared(address + 8 * kRowStep);
    }
#pragma unroll
    for (int i = 0; i < P::kBlocks; ++i) {
      const float b = L::kBlocks > 0 ? element(block[i], j) : 1.0f;
      block_uppers[i] = u * b, block_lowers[i] = l * b;
    }
#pragma unroll
    for (int i = 0; i < P::kRuns; ++i) {
      uppers[i] = of_run(i, block_uppers);
      lowers[i] = of_run(i, block_lowers);
    }
  }

  // --- one block of k ---
  // The product of the slot that is `slot` further on than the ring; of its first STEPS instructions along k.
  template <int STEPS = kStepsPerBlock>
  __device__ __forceinline__ void issue(const Slot<C>& operands, int slot, int part, int pass) {
    ptx::pin(temp);
    ptx::wgmma_fence();
    operands.template multiply<STEPS>(temp, true, part, slot, pass * P::kWidth);
    ptx::wgmma_commit();
  }

  // The same of a tile's first block, which counts for `steps` instructions.
  __device__ __forceinline__ void issue_first(const Slot<C>& operands, int steps, int part, int pass) {
    if (steps == kStepsPerBlock)
      issue(operands, 0, part, pass);
    else if (steps == 1)
      issue<1>(operands, 0, part, pass);
    else if (steps == 2)
      issue<2>(operands, 0, part, pass);
    else
      issue<3>(operands, 0, part, pass);
  }
  // A warp agrees on it (whole_warp in gemm_grouped.cuh says why the compiler must know).
  __device__ __forceinline__ static int first_steps(const Tile& tile) {
    return __shfl_sync(0xFFFFFFFF, ceil_div(min(tile.k_stop, C::BLOCK_K), 32), 0);
  }

  // Block j of the quad whose scales are loaded, in the slot `slot` further on than the ring, which it moves
  // on by STEP slots. `more`: whether a block follows; `last`: whether that one belongs to the next quad.
  // BEGUN: it is the tile's first one, of `steps`, and its product is on its way.
  template <int PASSES, int STEP, bool BEGUN = false>
  __device__ __forceinline__ void multiply(int j, int slot, bool more, bool last, int steps = 0) {
    const u32 empty = ring.empty(slot);
    const Slot<C> operands(ring, warpgroup);
    const int next = STEP > 0 ? 0 : slot + 1;
    Factors factor;
    Runs uppers, lowers;
#pragma unroll
    for (int step = 0; step < kParts<C> * PASSES; ++step) {
      const int part = step / PASSES, pass = step % PASSES;
      const bool final = step + 1 == kParts<C> * PASSES;
      if constexpr (C::WHOLE_BLOCKS && BEGUN) {
        if (step > 0) issue_first(operands, steps, part, pass);
      } else {
        if (!BEGUN || step > 0) issue(operands, slot, part, pass);
      }

      // Under the multiplication: the factors of its promotion, then what the next block needs.
      if (step == 0 && P::kHeld > 0) load_cols(j);
      if (pass == 0) part_factors(j, part, uppers, lowers);
      if constexpr (P::kFactorsEarly) {
#pragma unroll
        for (int i = 0; i < P::kFactors; ++i)
          factor[i] = (i % 4 < 2 || !P::kRowVector ? uppers[0] : lowers[0]) *
                      col[P::kRowVector ? i / 4 * 2 + i % 2 : i];
      }
      if (final) {
        if constexpr (STEP > 0) ring.template advance<STEP>();
        if (more) ring.wait_full(next);
      }
      ptx::wgmma_wait<0>();
      ptx::pin(temp);
      if (final) ring.release(empty);
      promote(j, acc[part], pass, factor, uppers, lowers);
    }
    if (last) {
      ring.advance_scales();
      if (more) load_quad();
    }
    if (more && P::kHeld == 0) load_cols(last ? 0 : j + 1);
  }

  __device__ __forceinline__ void promote(int j, float (&sums)[kCols<C> / 2], int pass, const Factors& factor,
                                          const Runs& uppers, const Runs& lowers) {
    if constexpr (P::kFactorsEarly) {
#pragma unroll
      for (int i = 0; i < kCols<C> / 2; ++i)
        sums[i] += factor[P::kRowVector ? i : i / 4 * 2 + i % 2] * temp[i];
    } else if constexpr (P::kColVector) {
#pragma unroll
      for (int i = 0; i < 2 * P::kGroups; ++i) {
        const float scale = i < P::kHeld ? col[i] : col_scale(j, i);
        const int first = i / 2 * 4 + i % 2;
        sums[first] += scale * temp[first] * uppers[0];
        sums[first + 2] += scale * temp[first + 2] * (P::kRowVector ? lowers[0] : uppers[0]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < P::kGroups; ++i) {
        const int run = (pass * P::kWidth + 8 * i) / P::kRun;
        float* to = sums + pass * (P::kWidth / 2) + 4 * i;
        to[0] += uppers[run] * temp[4 * i + 0];
        to[1] += uppers[run] * temp[4 * i + 1];
        to[2] += lowers[run] * temp[4 * i + 2];
        to[3] += lowers[run] * temp[4 * i + 3];
      }
    }
  }

  // --- a tile ---
  __device__ __forceinline__ void begin(const Tile& tile) {
    ring.wait_full();
    if constexpr (C::WHOLE_BLOCKS)
      issue_first(Slot<C>(ring, warpgroup), first_steps(tile), 0, 0);
    else
      issue(Slot<C>(ring, warpgroup), 0, 0, 0);
    // Else ptxas draws stores of the epilogue in between the instructions, where D leaves without TMA or is
    // float32.
    __syncwarp();
  }

  // The tile's first quad, `blocks` of `all`. It is the one that may lack blocks, so that the tests for it
  // stand in front of the loop over whole quads and not in it.
  template <int PASSES>
  __device__ __forceinline__ void first_quad(int blocks, int all, int steps) {
    load_quad();
    if (P::kHeld == 0) load_cols(0);
    multiply<PASSES, P::kUnit == 1 ? 1 : 0, true>(0, 0, blocks > 1, false, steps);
#pragma unroll
    for (int j = 1; j < kQuad; ++j) {
      const int slot = j % P::kUnit;
      const bool last = j + 1 == kQuad, more = last ? all > kQuad : j + 1 < blocks;
      if (j < blocks) {
        if (slot + 1 == P::kUnit)
          multiply<PASSES, P::kUnit>(j, slot, more, last);
        else
          multiply<PASSES, 0>(j, slot, more, last);
      } else {
        ring.pass(slot);
        if (slot + 1 == P::kUnit) ring.template advance<P::kUnit>();
      }
    }
    if (blocks == kQuad) return;
    ring.advance_scales();
    if (all == blocks) return;
    ring.wait_full();
    load_quad();
    if (P::kHeld == 0) load_cols(0);
  }

  __device__ __forceinline__ void finish(const Tile& tile) {
    if (C::HALVES && tile.half)
      finish_in<1>(tile);
    else
      finish_in<C::PASSES>(tile);
  }

  // How many blocks the first quad of a tile has; all further ones are whole.
  __device__ __forceinline__ static int first_quad_blocks(int blocks) {
    return (blocks + kQuad - 1) % kQuad + 1;
  }

  template <int PASSES>
  __device__ __forceinline__ void finish_in(const Tile& tile) {
    const int all = tile.k_end - tile.k_begin, first = first_quad_blocks(all);
    offset = tile.col % (L::kDown ? 512 : 128);
    first_quad<PASSES>(first, all, C::WHOLE_BLOCKS ? first_steps(tile) : 0);
#pragma unroll 1
    for (int left = all - first; left > 0; left -= kQuad) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const bool last = j + 1 == kQuad;
        if ((j + 1) % P::kUnit == 0)
          multiply<PASSES, P::kUnit>(j, j % P::kUnit, !last || left > kQuad, last);
        else
          multiply<PASSES, 0>(j, j % P::kUnit, true, false);
      }
    }
  }
};

}  // namespace jdg
