// Rows of an operand that an index names, into a slot of the ring: TMA of this architecture loads boxes only.
//
// clang-format off
//   the producer's warpgroup   copies 16 bytes a thread (cp.async), 16 rows of a slot at a time, to where TMA
//                              would put them (swizzle of 128 bytes)
//   one thread of it           loads the other operand through TMA beside that
//
//   full[s]                    an arrival of that thread, with its bytes, and one of each of the 128 threads,
//                              which comes when the copies that the thread has begun have landed
//
//   K-major rows               each row of the slot is a row of the operand, the same for all of a tile's k
//   MN-major                   each row of the slot is a value of k, in slabs of 64 columns
// clang-format on
//
// Whatever the index holds, nothing is read beside the operand: a number that is no row of it gives a row of
// zeros, and so do places of the index that belong to another group, which are not read.
//
// Hazard: cp.async writes shared memory through the generic proxy, and wgmma reads it through the async one.
// Each consumer passes a proxy fence between its wait for the slot and wgmma (Ring::wait_full).
//
// Hazard: an arrival of copies need not order what its thread wrote otherwise. Records are written by the
// thread that loads through TMA, whose own arrival is an ordinary one.
#pragma once

#include <jax_deepgemm/gemm/ring.cuh>
#include <jax_deepgemm/ptx/copy.cuh>

namespace jdg {

constexpr int kRowsAtOnce = kGatherers / 8;  // 16 bytes for each of 8 threads are a row of a slot

// An operand in global memory whose rows come by an index.
struct Indexed {
  const char* values;   // [rows, bytes]
  const float* scales;  // [rows, blocks], FP8 only
  const int* index;     // for each row of the product, or for each value of k
  int rows;             // of the operand
  int bytes;            // of a row: a multiple of 16
  int blocks;           // scales of a row: a multiple of 4

  // The row that stands at a place of the index, of which those up to `end` count; -1 for none.
  __device__ __forceinline__ int row(int place, int end) const {
    const int found = place < end ? __ldg(index + place) : -1;
    return static_cast<u32>(found) < static_cast<u32>(rows) ? found : -1;
  }
  // 16 bytes of a row into shared memory, or zeros.
  __device__ __forceinline__ void copy(u32 to, int row, int byte) const {
    ptx::forget(row);
    const bool exists = row >= 0 && byte < bytes;
    const char* at = values + static_cast<i64>(exists ? row : 0) * bytes + (exists ? byte : 0);
    ptx::copy_async(to, at, exists ? 16 : 0);
  }
  __device__ __forceinline__ void copy_scales(u32 to, int row, int kb) const {
    ptx::forget(row);
    ptx::copy_async(to, scales + static_cast<i64>(max(row, 0)) * blocks + kb, row >= 0 ? 16 : 0);
  }
};

// This thread's 16 bytes of every 16th row of a slot.
struct Gatherer {
  int thread, row, byte;
  __device__ __forceinline__ Gatherer()
      : thread(static_cast<int>(threadIdx.x) % kGatherers), row(thread / 8), byte(thread % 8 * 16) {}
  __device__ __forceinline__ u32 place() const { return row * kSlotRowBytes + (byte ^ row % 8 * 16); }
};

// Which rows of the operand this thread copies for all blocks of k of a tile, and whose scales.
template <class C>
struct RowSources {
  static constexpr int kCopies = C::ROWS / kRowsAtOnce;
  static constexpr int kScales = Layout<C>::kFp8 ? ceil_div(C::ROWS, kGatherers) : 0;
  int rows[kCopies], scaled[kScales > 0 ? kScales : 1];

  __device__ __forceinline__ RowSources(const Indexed& from, int first, int end) {
    const Gatherer me;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) rows[i] = from.row(first + me.row + i * kRowsAtOnce, end);
#pragma unroll
    for (int i = 0; i < kScales; ++i) scaled[i] = from.row(first + me.thread + i * kGatherers, end);
  }

  // A block of k, which begins `byte` bytes into the rows.
  __device__ __forceinline__ void load(u32 slot, const Indexed& from, int byte) const {
    const Gatherer me;
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      from.copy(slot + me.place() + i * kRowsAtOnce * kSlotRowBytes, rows[i], byte + me.byte);
  }
  // The scales of a quad of blocks.
  __device__ __forceinline__ void load_scales(u32 slot, const Indexed& from, int kb) const {
    const Gatherer me;
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const int row = me.thread + i * kGatherers;
      if (row < C::ROWS) from.copy_scales(slot + row * kQuad * 4, scaled[i], kb);
    }
  }
};

// A block of k of an MN-major operand, from place k of the index on: EXTENT columns from `first` on.
template <class C, int EXTENT>
__device__ __forceinline__ void gather_slabs(u32 slot, const Indexed& from, int first, int k, int end) {
  const Gatherer me;
#pragma unroll
  for (int i = 0; i < C::BLOCK_K / kRowsAtOnce; ++i) {
    const int row = from.row(k + me.row + i * kRowsAtOnce, end);
#pragma unroll
    for (int slab = 0; slab < ceil_div(EXTENT, 64); ++slab)
      from.copy(slot + (slab * C::BLOCK_K + i * kRowsAtOnce) * kSlotRowBytes + me.place(), row,
                (first + slab * 64) * 2 + me.byte);
  }
}

}  // namespace jdg
