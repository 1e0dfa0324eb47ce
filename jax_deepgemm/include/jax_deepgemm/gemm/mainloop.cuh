// The main loop of every Hopper GEMM kernel here: what a consumer warpgroup does with the slots of the ring
// (ring.cuh), in three forms: FP8 with scales in quads, FP8 with scales by block of k, BF16.
//
//   begin(tile)   once the tile's first slot was seen full: what may stand under the epilogue before it
//   finish(tile)  acc += rows tile * cols tile over the tile's range of k, all scales applied
//   skip()        instead of finish, for a tile without any k
//   drop()        instead of finish, where there is no tile
//
// Hazard: the FP8 tensor core accumulates with about 14 bits, hence the promotion to float32 after every
// 128 of k.
#pragma once

#include <jax_deepgemm/ptx/wgmma.cuh>
#include <jax_deepgemm/gemm/ring.cuh>

namespace jdg {

// This thread's place in the accumulator of its warpgroup: rows row and row + 8, columns 8i + col and 8i +
// col + 1 for every i; acc[4i + {0, 1}] belong to the first row, acc[4i + {2, 3}] to the second (PTX
// ISA 9.7.15.5, m64nNk*).
struct Fragment {
  int row, col;
  __device__ __forceinline__ Fragment() {
    const int thread = ptx::thread_index();
    row = thread / 32 % 4 * 16 + thread % 32 / 4, col = thread % 4 * 2;
  }
};

// The operands of one warpgroup in a slot, and their multiplication.
template <class C>
struct Slot {
  static constexpr u32 kSlabBytes = 64 * kSlotRowBytes;  // of rows: 64 K-major ones, or one MN-major slab
  ptx::Descriptor rows, cols;

  __device__ __forceinline__ Slot(const Position<C>& at, int warpgroup) {
    static_assert(C::ACROSS == 1 || kCols<C> % 64 == 0, "whole slabs of MN-major columns");
    const u32 a = at.rows() + first_part<C>(warpgroup) * kSlabBytes;
    const u32 b = at.cols() + first_col<C>(warpgroup) * kSlotRowBytes;
    rows = C::ROWS_K_MAJOR ? ptx::k_major_descriptor(a) : ptx::mn_major_descriptor(a, kSlabBytes);
    cols = C::COLS_K_MAJOR ? ptx::k_major_descriptor(b) : ptx::mn_major_descriptor(b, kSlabBytes);
  }

  // One of the warpgroup's parts of 64 rows by the columns from `first` on, of the slot that is `ahead`
  // further on. To be committed.
  template <int COUNT>
  __device__ __forceinline__ void multiply(float (&d)[COUNT], bool overwrite, int part = 0, int ahead = 0,
                                           int first = 0) const {
    constexpr int kRowsStep = C::ROWS_K_MAJOR ? 32 : 2048, kColsStep = C::COLS_K_MAJOR ? 32 : 2048;
    const int a = ahead * Layout<C>::kRowsBytes + part * kSlabBytes;
    const int b = ahead * Layout<C>::kColsBytes + first * kSlotRowBytes;
#pragma unroll
    for (int step = 0; step < kStepsPerBlock; ++step)
      C::Mma::issue(d, rows.plus(a + step * kRowsStep), cols.plus(b + step * kColsStep),
                    !overwrite || step > 0);
  }
};

// Zeroes what a slot holds beside the tile's range of k, in both operands, since 0 times what lies there may
// be NaN. Each warpgroup does it for all that it reads; where warpgroups share rows or columns they write
// equal bytes, and nothing else.
//
// Hazard: written by ordinary stores, read by wgmma and later overwritten by TMA: fence.proxy.async.
template <class C>
__device__ __forceinline__ void mask_rows(u32 base, int count, int begin, int end) {
  constexpr int kElement = kSlotRowBytes / C::BLOCK_K;
  const int first = begin * kElement, stop = end * kElement;  // bytes of a row of the slot
  for (int i = threadIdx.x % 128; i < count * 8; i += 128) {
    const int row = i / 8, at = i % 8 * 16;
    const u32 chunk = base + row * kSlotRowBytes + (at ^ row % 8 * 16);
    if (at + 16 <= first || at >= stop) {
      ptx::store_shared_4(chunk, 0, 0, 0, 0);
    } else {
      for (int byte = 0; byte < first - at; ++byte) ptx::store_shared_byte(chunk + byte, 0);
      for (int byte = max(stop - at, 0); byte < 16; ++byte) ptx::store_shared_byte(chunk + byte, 0);
    }
  }
}

// The same for an MN-major operand: rows of the slot are values of k, in slabs of 64.
template <class C>
__device__ __forceinline__ void mask_slabs(u32 base, int slabs, int begin, int end) {
  for (int i = threadIdx.x % 128; i < slabs * C::BLOCK_K * 8; i += 128) {
    const int k = i / 8 % C::BLOCK_K;
    if (k < begin || k >= end) ptx::store_shared_4(base + i * 16, 0, 0, 0, 0);
  }
}

template <class C>
__device__ __forceinline__ void mask_slot(const Position<C>& at, const Tile& tile, int kb, int warpgroup) {
  if constexpr (C::MASK_K) {
    const int begin = kb == tile.k_begin ? tile.k_skip : 0;
    const int end = kb + 1 == tile.k_end ? min(tile.k_stop, C::BLOCK_K) : C::BLOCK_K;
    if (begin == 0 && end == C::BLOCK_K) return;
    const u32 rows = at.rows() + first_part<C>(warpgroup) * 64 * kSlotRowBytes;
    if constexpr (C::ROWS_K_MAJOR)
      mask_rows<C>(rows, 64 * kParts<C>, begin, end);
    else
      mask_slabs<C>(rows, kParts<C>, begin, end);
    if constexpr (C::COLS_K_MAJOR)
      mask_rows<C>(at.cols(), C::COLS, begin, end);
    else
      mask_slabs<C>(at.cols(), ceil_div(C::COLS, 64), begin, end);
    ptx::fence_proxy_async();
    ptx::warpgroup_barrier(warpgroup);
  }
}

__device__ __forceinline__ float element(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Of a warpgroup, by parts of 64 rows.
template <class C>
using Accumulator = float[kParts<C>][kCols<C> / 2];

// Registers beside an FP8 accumulator, a product and what every loop needs.
template <class C>
constexpr int kSpare = C::REGISTERS - (kParts<C> + 1) * kCols<C> / 2 - 32;

// What the three have in common.
template <class C>
struct PlainLoop {
  Accumulator<C>& acc;
  Position<C>& at;
  const int warpgroup;

  __device__ __forceinline__ PlainLoop(Accumulator<C>& acc, Position<C>& at, int warpgroup)
      : acc(acc), at(at), warpgroup(warpgroup) {}
  __device__ __forceinline__ void begin(const Tile&) {}
  __device__ __forceinline__ void skip() { skip_empty_tile<C>(at); }
  __device__ __forceinline__ void drop() {}
};

// FP8: a tile's first product is on its way before finish(), in an accumulator of its own.
template <class C>
struct BegunLoop : PlainLoop<C> {
  using PlainLoop<C>::at, PlainLoop<C>::PlainLoop;

  const Fragment mine;
  float temp[kCols<C> / C::PASSES / 2];  // the product

  __device__ __forceinline__ void drop() {
    ptx::wgmma_wait<0>();
    ptx::pin(temp);
  }

  __device__ __forceinline__ void skip() {
    drop();
    skip_empty_tile<C>(at);
  }
};

// FP8: the product of one block of k in an accumulator of its own, promoted with its scales. Wide tiles are
// multiplied in PASSES over their columns, high ones in parts of 64 rows, which share it, one after the
// other.
//
// The next block's barrier is waited for while the tensor core is busy with this one: between two
// multiplications of a warpgroup stand only promotion, issue, and every fourth time the loads of a quad of
// scales. A tile's first product is issued before the epilogue of the tile before it. A slot without data is
// multiplied there too, whatever it holds, and the product not looked at; nothing writes to a slot that is
// not released.
//
// Hazard: from issue to wait the tensor core writes `temp`. ptxas would serialise (C7510, C7514) if anything
// in between touched it.
template <class C>
struct Fp8Loop : BegunLoop<C> {
  using L = Layout<C>;
  using BegunLoop<C>::acc, BegunLoop<C>::at, BegunLoop<C>::warpgroup, BegunLoop<C>::BegunLoop;
  using BegunLoop<C>::mine, BegunLoop<C>::temp;
  static constexpr int kUnit = gcd(C::STAGES, kQuad);  // blocks whose slots are neighbours
  static constexpr int kWidth = kCols<C> / C::PASSES, kGroups = kWidth / 8;
  static constexpr bool kColVector = C::COL_SCALES == Scale::kVector;
  static constexpr bool kRowVector = C::ROW_SCALES == Scale::kVector;
  // 128-blocks that a warpgroup's columns can touch; side by side they begin at halves of blocks.
  static constexpr int kBlocks = L::kBlocks == 0 || C::ACROSS > 1 ? 1 : L::kBlocks;
  // Neighbouring columns that share a 128x128 scale wherever a tile begins, and how many such runs it has.
  static constexpr int kRun = kColVector ? kCols<C> : gcd(kCols<C>, 128), kRuns = kCols<C> / kRun;
  // Per-column scales are a factor for every element or column. Where registers allow, they are read before
  // the multiplication is issued, otherwise by promotion.
  static constexpr int kFactors = kRowVector ? kCols<C> / 2 : 2 * kGroups;
  static constexpr bool kFactorsEarly =
      kColVector && kParts<C> == 1 && kCols<C> + kFactors <= C::REGISTERS - 40;
  // A warpgroup with several parts holds column scales, as many as registers allow, through all of them.
  static constexpr int kHeld = kColVector && kParts<C> > 1 ? smaller(2 * kGroups, kSpare<C>) : 0;
  static constexpr bool kRowsByQuad = kRowVector && kParts<C> == 1;  // else they are read block by block
  static_assert(!C::MASK_K, "begin() multiplies a slot as it is");
  static_assert(C::PASSES == 2 || !C::HALVES, "half a tile is the first of two passes");
  static_assert(C::PASSES == 1 || (C::COL_SCALES == Scale::kBlock && kWidth % 128 == 0), "whole blocks");

  // Scales of a quad: of this thread's two rows, and of the 128x128 blocks; of one block: of this thread's
  // columns.
  float4 upper, lower, block[kBlocks];
  int offset;  // the tile's first column modulo 128
  float col[kFactorsEarly ? 2 * kGroups : kHeld > 0 ? kHeld : 1];

  __device__ __forceinline__ u32 row_scales() const {
    return at.row_scales() + (64 * first_part<C>(warpgroup) + mine.row) * kQuad * 4;
  }
  __device__ __forceinline__ void load_quad() {
    if constexpr (kRowsByQuad) {
      upper = ptx::load_shared_4(row_scales());
      lower = ptx::load_shared_4(row_scales() + 8 * kQuad * 4);
    }
#pragma unroll
    for (int i = 0; L::kBlocks > 0 && i < kBlocks; ++i)
      block[i] = ptx::load_shared_4(at.block_scales() + (first_col<C>(warpgroup) / 128 + i) * kQuad * 4);
  }
  __device__ __forceinline__ float col_scale(int j, int i) const {
    const int col = first_col<C>(warpgroup) + mine.col;
    return ptx::load_shared(at.col_scales() + col * kQuad * 4 + ((i / 2 * 8 + i % 2) * kQuad + j) * 4);
  }
  __device__ __forceinline__ void load_cols(int j) {
    constexpr int kCount = kFactorsEarly ? 2 * kGroups : kHeld;
#pragma unroll
    for (int i = 0; i < kCount; ++i) col[i] = col_scale(j, i);
  }

  // Which of the numbers of a tile's 128-blocks is a run's.
  __device__ __forceinline__ float of_run(int run, const float (&blocks)[kBlocks]) const {
    float chosen = blocks[0];
#pragma unroll
    for (int b = 1; b < kBlocks; ++b) {
      const int least = run * kRun - 128 * b, most = least + 128 - kRun;  // without and with any offset
      if (least >= 0 || (most >= 0 && least + offset >= 0)) chosen = blocks[b];
    }
    return chosen;
  }

  // The product of the slot that is `slot` further on than `at`.
  __device__ __forceinline__ void issue(const Slot<C>& operands, int slot, int part, int pass) {
    ptx::pin(temp);
    ptx::wgmma_fence();
    operands.multiply(temp, true, part, slot, pass * kWidth);
    ptx::wgmma_commit();
  }

  // Block j of the quad whose scales are loaded, in the slot `slot` further on than `at`, which it moves on
  // by STEP slots. `more`: whether a block follows; `last`: whether that one belongs to the next quad. BEGUN:
  // its product is on its way.
  template <int PASSES, int STEP, bool BEGUN = false>
  __device__ __forceinline__ void multiply(int j, int slot, bool more, bool last) {
    const u32 empty = at.empty() + slot * 8;
    const Slot<C> operands(at, warpgroup);
    const int next = STEP > 0 ? 0 : slot + 1;
    float factor[kFactorsEarly ? kFactors : 1], uppers[kRuns], lowers[kRuns];
#pragma unroll
    for (int step = 0; step < kParts<C> * PASSES; ++step) {
      const int part = step / PASSES, pass = step % PASSES;
      const bool final = step + 1 == kParts<C> * PASSES;
      if (!BEGUN || step > 0) issue(operands, slot, part, pass);

      // Under the multiplication: the factors of its promotion, then what the next block needs.
      if (step == 0 && kHeld > 0) load_cols(j);
      if (pass == 0) part_factors(j, part, uppers, lowers);
      if constexpr (kFactorsEarly) {
#pragma unroll
        for (int i = 0; i < kFactors; ++i)
          factor[i] =
              (i % 4 < 2 || !kRowVector ? uppers[0] : lowers[0]) * col[kRowVector ? i / 4 * 2 + i % 2 : i];
      }
      if (final) {
        if constexpr (STEP > 0) at.template advance<STEP>();
        if (more) ptx::mbarrier_wait(at.full() + next * 8, at.phase);
      }
      ptx::wgmma_wait<0>();
      ptx::pin(temp);
      if (final && threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty);
      promote(j, acc[part], pass, factor, uppers, lowers);
    }
    if (last) {
      at.advance_scales();
      if (more) load_quad();
    }
    if (more && kHeld == 0) load_cols(last ? 0 : j + 1);
  }

  // Row scales times those of the 128x128 blocks, for each run of columns.
  __device__ __forceinline__ void part_factors(int j, int part, float (&uppers)[kRuns],
                                               float (&lowers)[kRuns]) const {
    float u = 1.0f, l = 1.0f, block_uppers[kBlocks], block_lowers[kBlocks];
    if constexpr (kRowsByQuad) {
      u = element(upper, j), l = element(lower, j);
    } else if constexpr (kRowVector) {
      const u32 address = row_scales() + (part * 64 * kQuad + j) * 4;
      u = ptx::load_shared(address), l = ptx::load_shared(address + 8 * kQuad * 4);
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const float b = L::kBlocks > 0 ? element(block[i], j) : 1.0f;
      block_uppers[i] = u * b, block_lowers[i] = l * b;
    }
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      uppers[i] = of_run(i, block_uppers);
      lowers[i] = of_run(i, block_lowers);
    }
  }

  __device__ __forceinline__ void promote(int j, float (&sums)[kCols<C> / 2], int pass,
                                          const float (&factor)[kFactorsEarly ? kFactors : 1],
                                          const float (&uppers)[kRuns], const float (&lowers)[kRuns]) {
    if constexpr (kFactorsEarly) {
#pragma unroll
      for (int i = 0; i < kCols<C> / 2; ++i) sums[i] += factor[kRowVector ? i : i / 4 * 2 + i % 2] * temp[i];
    } else if constexpr (kColVector) {
#pragma unroll
      for (int i = 0; i < 2 * kGroups; ++i) {
        const float scale = i < kHeld ? col[i] : col_scale(j, i);
        const int first = i / 2 * 4 + i % 2;
        sums[first] += scale * temp[first] * uppers[0];
        sums[first + 2] += scale * temp[first + 2] * (kRowVector ? lowers[0] : uppers[0]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const int run = (pass * kWidth + 8 * i) / kRun;
        float* to = sums + pass * (kWidth / 2) + 4 * i;
        to[0] += uppers[run] * temp[4 * i + 0];
        to[1] += uppers[run] * temp[4 * i + 1];
        to[2] += lowers[run] * temp[4 * i + 2];
        to[3] += lowers[run] * temp[4 * i + 3];
      }
    }
  }

  __device__ __forceinline__ void begin(const Tile&) {
    ptx::mbarrier_wait(at.full(), at.phase);
    issue(Slot<C>(at, warpgroup), 0, 0, 0);
    __syncwarp();  // ptxas would draw stores of the epilogue in between the instructions
  }

  // The tile's first quad, `blocks` of `all`. Were it the last that may lack some, behind the loop, ptxas
  // would spill.
  template <int PASSES>
  __device__ __forceinline__ void first_quad(int blocks, int all) {
    load_quad();
    if (kHeld == 0) load_cols(0);
    multiply<PASSES, kUnit == 1 ? 1 : 0, true>(0, 0, blocks > 1, false);
#pragma unroll
    for (int j = 1; j < kQuad; ++j) {
      const int slot = j % kUnit;
      const bool last = j + 1 == kQuad, more = last ? all > kQuad : j + 1 < blocks;
      if (j < blocks) {
        if (slot + 1 == kUnit)
          multiply<PASSES, kUnit>(j, slot, more, last);
        else
          multiply<PASSES, 0>(j, slot, more, last);
      } else {
        pass_slot(at.full() + slot * 8, at.empty() + slot * 8, at.phase);
        if (slot + 1 == kUnit) at.template advance<kUnit>();
      }
    }
    if (blocks == kQuad) return;
    at.advance_scales();
    if (all == blocks) return;
    ptx::mbarrier_wait(at.full(), at.phase);
    load_quad();
    if (kHeld == 0) load_cols(0);
  }

  __device__ __forceinline__ void finish(const Tile& tile) {
    if (C::HALVES && tile.half)
      finish_in<1>(tile);
    else
      finish_in<C::PASSES>(tile);
  }

  template <int PASSES>
  __device__ __forceinline__ void finish_in(const Tile& tile) {
    const int all = tile.k_end - tile.k_begin, first = first_quad_blocks(all);
    offset = tile.col % 128;
    first_quad<PASSES>(first, all);
#pragma unroll 1
    for (int left = all - first; left > 0; left -= kQuad) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const bool last = j + 1 == kQuad;
        if ((j + 1) % kUnit == 0)
          multiply<PASSES, kUnit>(j, j % kUnit, !last || left > kQuad, last);
        else
          multiply<PASSES, 0>(j, j % kUnit, true, false);
      }
    }
  }
};

// FP8 with both operands' scales stored by block of k: a factor for every element. The first product as in
// Fp8Loop, after its slot was masked.
template <class C>
struct SlicedLoop : BegunLoop<C> {
  using BegunLoop<C>::acc, BegunLoop<C>::at, BegunLoop<C>::warpgroup, BegunLoop<C>::BegunLoop;
  using BegunLoop<C>::mine, BegunLoop<C>::temp;

  // Of this thread's pairs of column scales, those that it holds through all parts.
  static constexpr int kPairs = kCols<C> / 8;
  static constexpr int kHeld = kParts<C> > 1 ? smaller(kPairs, kSpare<C> / 2) : 0;

  __device__ __forceinline__ void begin(const Tile& tile) {
    mask_slot<C>(at, tile, tile.k_begin, warpgroup);
    issue(Slot<C>(at, warpgroup), 0);
    __syncwarp();  // as in Fp8Loop
  }

  __device__ __forceinline__ void issue(const Slot<C>& operands, int part) {
    ptx::pin(temp);
    ptx::wgmma_fence();
    operands.multiply(temp, true, part);
    ptx::wgmma_commit();
  }

  // The block of which the first part's product is on its way. `more`: whether a block follows.
  __device__ __forceinline__ void promote(bool more) {
    const Slot<C> operands(at, warpgroup);
    const u32 empty = at.empty(), cols = at.col_scales() + (first_col<C>(warpgroup) + mine.col) * 4;
    const u32 rows = at.row_scales() + (64 * first_part<C>(warpgroup) + mine.row) * 4;
    float2 held[kHeld > 0 ? kHeld : 1];
#pragma unroll
    for (int part = 0; part < kParts<C>; ++part) {
      if (part > 0) issue(operands, part);
      const float upper = ptx::load_shared(rows + part * 64 * 4);
      const float lower = ptx::load_shared(rows + (part * 64 + 8) * 4);
#pragma unroll
      for (int i = 0; part == 0 && i < kHeld; ++i) held[i] = ptx::load_shared_2(cols + i * 8 * 4);
      const bool final = part + 1 == kParts<C>;
      if (final) {
        at.advance();
        at.advance_scales();
        if (more) ptx::mbarrier_wait(at.full(), at.phase);
      }

      ptx::wgmma_wait<0>();
      ptx::pin(temp);
      if (final && threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty);
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

  __device__ __forceinline__ void finish(const Tile& tile) {
    promote(tile.k_begin + 1 < tile.k_end);
#pragma unroll 1
    for (int kb = tile.k_begin + 1; kb < tile.k_end; ++kb) {
      mask_slot<C>(at, tile, kb, warpgroup);
      issue(Slot<C>(at, warpgroup), 0);
      promote(kb + 1 < tile.k_end);
    }
  }
};

// BF16: one accumulator over all of k, one block in flight behind the one being issued.
template <class C>
struct Bf16Loop : PlainLoop<C> {
  using PlainLoop<C>::acc, PlainLoop<C>::at, PlainLoop<C>::warpgroup, PlainLoop<C>::PlainLoop;

  __device__ __forceinline__ void pin() {
#pragma unroll
    for (int part = 0; part < kParts<C>; ++part) ptx::pin(acc[part]);
  }
  __device__ __forceinline__ void skip() {
    skip_empty_tile<C>(at);
    pass_turn<C>(at, warpgroup);
  }

  __device__ __forceinline__ void finish(const Tile& tile) {
    u32 previous = 0;
    pin();
    for (int kb = tile.k_begin; kb < tile.k_end; ++kb) {
      ptx::mbarrier_wait(at.full(), at.phase);
      mask_slot<C>(at, tile, kb, warpgroup);
      ptx::wgmma_fence();
#pragma unroll
      for (int part = 0; part < kParts<C>; ++part) Slot<C>(at, warpgroup).multiply(acc[part], false, part);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (kb > tile.k_begin && threadIdx.x % 32 == 0) ptx::mbarrier_arrive(previous);
      previous = at.empty();
      at.advance();
    }
    pass_turn<C>(at, warpgroup);
    ptx::wgmma_wait<0>();
    pin();
    if (tile.k_begin < tile.k_end && threadIdx.x % 32 == 0) ptx::mbarrier_arrive(previous);
  }
};

template <class C, Scale ROW_SCALES = C::ROW_SCALES>
struct LoopOf {
  using Type = Fp8Loop<C>;
};
template <class C>
struct LoopOf<C, Scale::kSlices> {
  using Type = SlicedLoop<C>;
};
template <class C>
struct LoopOf<C, Scale::kNone> {
  using Type = Bf16Loop<C>;
};
template <class C>
using MainLoop = typename LoopOf<C>::Type;

}  // namespace jdg
