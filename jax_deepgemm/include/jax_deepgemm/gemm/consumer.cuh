// What the consumers' main loops (mainloop.cuh) have in common: a warpgroup's operands in a slot and their
// multiplication, the zeroing of what a slot holds beside a tile's k, and the accumulator.
#pragma once

#include <jax_deepgemm/gemm/producer.cuh>
#include <jax_deepgemm/ptx/wgmma.cuh>

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

  __device__ __forceinline__ Slot(const Ring<C>& ring, int warpgroup) {
    static_assert(C::ACROSS == 1 || kCols<C> % 64 == 0, "whole slabs of MN-major columns");
    const u32 a = ring.rows() + first_part<C>(warpgroup) * kSlabBytes;
    const u32 b = ring.cols() + first_col<C>(warpgroup) * kSlotRowBytes;
    rows = C::ROWS_K_MAJOR ? ptx::k_major_descriptor(a) : ptx::mn_major_descriptor(a, kSlabBytes);
    cols = C::COLS_K_MAJOR ? ptx::k_major_descriptor(b) : ptx::mn_major_descriptor(b, kSlabBytes);
  }

  // One of the warpgroup's parts of 64 rows by the columns from `first` on, of the slot that is `ahead`
  // further on. To be committed.
  // STEPS: instructions along k.
  template <int STEPS = kStepsPerBlock, int COUNT>
  __device__ __forceinline__ void multiply(float (&d)[COUNT], bool overwrite, int part = 0, int ahead = 0,
                                           int first = 0) const {
    constexpr int kRowsStep = C::ROWS_K_MAJOR ? 32 : 2048, kColsStep = C::COLS_K_MAJOR ? 32 : 2048;
    const int a = ahead * Layout<C>::kRowsBytes + part * kSlabBytes;
    const int b = ahead * Layout<C>::kColsBytes + first * kSlotRowBytes;
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
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
__device__ __forceinline__ void mask_slot(const Ring<C>& ring, const Tile& tile, int kb, int warpgroup) {
  if constexpr (C::MASK_K) {
    const int begin = kb == tile.k_begin ? tile.k_skip : 0;
    const int end = kb + 1 == tile.k_end ? min(tile.k_stop, C::BLOCK_K) : C::BLOCK_K;
    if (begin == 0 && end == C::BLOCK_K) return;
    const u32 rows = ring.rows() + first_part<C>(warpgroup) * 64 * kSlotRowBytes;
    if constexpr (C::ROWS_K_MAJOR)
      mask_rows<C>(rows, 64 * kParts<C>, begin, end);
    else
      mask_slabs<C>(rows, kParts<C>, begin, end);
    if constexpr (C::COLS_K_MAJOR)
      mask_rows<C>(ring.cols(), C::COLS, begin, end);
    else
      mask_slabs<C>(ring.cols(), ceil_div(C::COLS, 64), begin, end);
    ptx::fence_proxy_async();
    ptx::warpgroup_barrier(warpgroup);
  }
}

// Of a warpgroup, by parts of 64 rows.
template <class C>
using Accumulator = float[kParts<C>][kCols<C> / 2];

template <int COUNT>
__device__ __forceinline__ void clear(float (&acc)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) acc[i] = 0.0f;
}

// Registers beside an FP8 accumulator, a product and what every loop needs.
template <class C>
constexpr int kSpare = C::REGISTERS - (kParts<C> + 1) * kCols<C> / 2 - 32;

// What all loops have in common.
template <class C>
struct PlainLoop {
  Accumulator<C>& acc;
  Ring<C>& ring;
  const int warpgroup;

  __device__ __forceinline__ PlainLoop(Accumulator<C>& acc, Ring<C>& ring, int warpgroup)
      : acc(acc), ring(ring), warpgroup(warpgroup) {}
  __device__ __forceinline__ void begin(const Tile&) {}
  __device__ __forceinline__ void skip() { skip_empty_tile<C>(ring); }
  __device__ __forceinline__ void drop() {}
};

// FP8: a tile's first product is on its way before finish(), in an accumulator of its own.
//
// Hazard: from issue to wait the tensor core writes `temp`. ptxas would serialise (C7510, C7514) if anything
// in between touched it.
template <class C, int PRODUCTS = 1>
struct BegunLoop : PlainLoop<C> {
  using PlainLoop<C>::ring, PlainLoop<C>::PlainLoop;

  const Fragment mine;
  float temp[PRODUCTS * kCols<C> / C::PASSES / 2];  // the product, or several

  __device__ __forceinline__ void drop() {
    ptx::wgmma_wait<0>();
    ptx::pin(temp);
  }

  __device__ __forceinline__ void skip() {
    drop();
    skip_empty_tile<C>(ring);
  }
};

}  // namespace jdg
