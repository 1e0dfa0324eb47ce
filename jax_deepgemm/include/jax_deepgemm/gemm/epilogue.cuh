// From the accumulator of a consumer warpgroup to D.
//
// D whose rows are 16-byte aligned leaves through TMA, which clips tails in m and n. A warp owns 16 rows and
// writes them in slabs of 8 rows of 128 bytes (16-byte chunks exchanged by row, which is TMA's 128-byte
// swizzle, against bank conflicts); one of its lanes hands them to TMA. No barrier between warps. The warp
// goes on to the next tile while its SLABS slabs drain; where they do not hold all of its rows it fills one
// half of them while the other drains.
//
// clang-format off
// D = C + product:
//   float32, C in D's memory   TMA (or red) adds the product to it in L2; C never enters an SM
//   otherwise                  an FP8 accumulator begins with C, a BF16 one meets it here (gemm_small_m.cuh:
//                              where partial products are summed), as does one that becomes something else
//                              first (finish.cuh)
// clang-format on
// Each element meets one addition, so that bits do not depend on the order of tiles.
//
// Hazard: slabs are written by ordinary stores and read by TMA: fence.proxy.async between (PTX ISA 9.7.9.25).
#pragma once

#include <jax_deepgemm/gemm/mainloop.cuh>

namespace jdg {

struct Extents {
  int m, n, batches;
  int batched_c;  // 0 where all batches share C, else 1
  int stripe;     // row tiles walked together before the next column, for reuse in L2
};

// What becomes of a product before it is stored: nothing. finish.cuh has what else there is.
struct AsItIs {
  static constexpr bool kChanges = false;    // whether its numbers become others
  static constexpr bool kQuantized = false;  // whether D is FP8, with scales
  template <class C>
  struct StoredAs {
    using Type = C;
  };
  __device__ __forceinline__ static Extents stored(const Extents& p) { return p; }
  __device__ __forceinline__ static Tile stored(const Tile& tile) { return tile; }
  __device__ __forceinline__ static int column(int col) { return col; }
  __device__ __forceinline__ AsItIs of(int, const Extents&) const { return {}; }
  template <class C>
  __device__ __forceinline__ void apply(float (&)[kCols<C> / 2], const Extents&, const Tile&) const {}
  __device__ __forceinline__ void apply(float (&)[4], const Extents&, int) const {}
  template <class C>
  __device__ __forceinline__ static void fill_holes(typename C::Out*, const Extents&, int, const Tile&, int) {
  }
  template <class Out>
  __device__ __forceinline__ static void fill_hole(Out*, int, int) {}
};

// A configuration whose tiles are D's.
template <class E, class C>
using Stored = typename E::template StoredAs<C>::Type;

constexpr int kSlabRows = 8, kSlabBytes = kSlabRows * 128;
template <class C>
constexpr int kSlabCols = 128 / sizeof(typename C::Out);

// From a row of C or D to the next one of the same batch.
template <class C>
__device__ __forceinline__ auto row_pitch(const Extents& p) {
  if constexpr (C::BATCH_INSIDE)
    return static_cast<i64>(p.n) * p.batches;
  else
    return p.n;
}

template <class C, class T>
__device__ __forceinline__ T* matrix_of(T* base, const Extents& p, int batch) {
  if constexpr (C::BATCH_INSIDE) return base + static_cast<i64>(batch) * p.n;
  return base + static_cast<i64>(batch) * p.m * p.n;
}

__device__ __forceinline__ float2 load_pair(const float* c) { return *reinterpret_cast<const float2*>(c); }
__device__ __forceinline__ float2 load_pair(const bf16* c) {
  const u32 packed = *reinterpret_cast<const u32*>(c);
  return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xFFFF0000u)};
}
__device__ __forceinline__ void store_pair(float* d, float a, float b) {
  *reinterpret_cast<float2*>(d) = {a, b};
}
__device__ __forceinline__ void store_pair(bf16* d, float a, float b) {
  *reinterpret_cast<u32*>(d) = ptx::pack_bf16(a, b);
}
__device__ __forceinline__ void store_one(float* d, float v) { *d = v; }
__device__ __forceinline__ void store_one(bf16* d, float v) { *d = ptx::to_bf16(v); }

// Into D, or with REDUCE onto what lies there.
template <class C>
__device__ __forceinline__ void put_pair(typename C::Out* d, float a, float b) {
  if constexpr (C::REDUCE)
    ptx::reduce_add(d, a, b);
  else
    store_pair(d, a, b);
}

// Puts C into the accumulator (START) or adds it there, in float32 and before the one rounding. As the
// starting value of an FP8 accumulator its loads hide behind the first block of k; the tensor core itself,
// which BF16 accumulates in, truncates, and is kept away from large values of C.
template <class C, bool START>
__device__ __forceinline__ void add_c(float (&acc)[kCols<C> / 2], const typename C::Out* c, const Extents& p,
                                      const Tile& tile, int first_row) {
  constexpr int kInFlight = 32;  // registers that loads may take beside the accumulator
  const Fragment mine;
#pragma unroll
  for (int i = 0; i < kCols<C> / 2; i += 2) {
    if (!START && i % kInFlight == 0) asm volatile("" ::: "memory");
    const int row = first_row + mine.row + i / 2 % 2 * 8, col = tile.col + i / 4 * 8 + mine.col;
    const typename C::Out* at = c + static_cast<i64>(row) * row_pitch<C>(p) + col;
    float2 pair = {0.0f, 0.0f};
    if constexpr (C::EVEN_N) {
      if (row < p.m && col < p.n) pair = load_pair(at);
    } else {
      if (row < p.m && col < p.n) pair.x = ptx::to_float(at[0]);
      if (row < p.m && col + 1 < p.n) pair.y = ptx::to_float(at[1]);
    }
    acc[i] = START ? pair.x : acc[i] + pair.x;
    acc[i + 1] = START ? pair.y : acc[i + 1] + pair.y;
  }
}

// All parts of a tile's accumulator before its first product: C where an FP8 one begins with it, else zeros.
template <class C, class E = AsItIs>
__device__ __forceinline__ void start_accumulator(Accumulator<C>& acc, const typename C::Out* c,
                                                  const Extents& p, const Tile& tile, int first_row) {
#pragma unroll
  for (int part = 0; part < kParts<C>; ++part) {
    if constexpr (C::ADD && Layout<C>::kFp8 && !E::kChanges)
      add_c<C, true>(acc[part], c, p, tile, first_row + part * 64);
    else
      clear(acc[part]);
  }
}

// Columns from FIRST on, straight from the accumulator: rows that are not 16-byte aligned, and the columns of
// a tile beyond its last whole slab.
template <class C, int FIRST = 0>
__device__ __forceinline__ void store_direct(const float (&acc)[kCols<C> / 2], typename C::Out* d,
                                             const Extents& p, const Tile& tile, int first_row) {
  const Fragment mine;
  const int end = tile.half ? min(p.n, tile.col + kCols<C> / 2) : p.n;
#pragma unroll
  for (int i = FIRST / 2; i < kCols<C> / 2; i += 2) {
    const int row = first_row + mine.row + i / 2 % 2 * 8, col = tile.col + i / 4 * 8 + mine.col;
    typename C::Out* at = d + static_cast<i64>(row) * row_pitch<C>(p) + col;
    if constexpr (C::EVEN_N) {
      if (row < p.m && col < end) put_pair<C>(at, acc[i], acc[i + 1]);
    } else {
      if (row < p.m && col < end) store_one(at, acc[i]);
      if (row < p.m && col + 1 < end) store_one(at + 1, acc[i + 1]);
    }
  }
}

// D = accumulator + C without staging: C is read where D is written, a few elements ahead, so that the
// accumulator's registers fall free on the way.
template <class C>
__device__ __forceinline__ void store_sum(const float (&acc)[kCols<C> / 2], typename C::Out* d,
                                          const typename C::Out* c, const Extents& p, const Tile& tile,
                                          int first_row) {
  constexpr int kCount = kCols<C> / 2, kAhead = 16;
  const Fragment mine;
  const int row = first_row + mine.row, col = tile.col + mine.col;
#pragma unroll
  for (int first = 0; first < kCount; first += kAhead) {
    float2 addend[kAhead / 2];
#pragma unroll
    for (int i = 0; i < kAhead && first + i < kCount; i += 2) {
      const int r = row + i / 2 % 2 * 8, k = col + (first + i) / 4 * 8;
      if (r < p.m && k < p.n) addend[i / 2] = load_pair(c + (static_cast<i64>(r) * row_pitch<C>(p) + k));
    }
#pragma unroll
    for (int i = 0; i < kAhead && first + i < kCount; i += 2) {
      const int r = row + i / 2 % 2 * 8, k = col + (first + i) / 4 * 8;
      if (r < p.m && k < p.n)
        store_pair(d + (static_cast<i64>(r) * row_pitch<C>(p) + k), acc[first + i] + addend[i / 2].x,
                   acc[first + i + 1] + addend[i / 2].y);
    }
  }
}

// Eight of a warp's rows, `half` of its 16, by a slab's columns, of which acc[0] is the first element.
__device__ __forceinline__ void fill_slab(u32 slab, const float* acc, int half, int lane, const bf16*) {
  const u32 row = slab + lane % 8 * 128;
#pragma unroll
  for (int chunk = 0; chunk < 8; chunk += 4) {
    const float* a = acc + chunk * 4 + half * 2;
    ptx::store_matrix_x4(row + ((chunk + lane / 8) ^ (lane % 8)) * 16, ptx::pack_bf16(a[0], a[1]),
                         ptx::pack_bf16(a[4], a[5]), ptx::pack_bf16(a[8], a[9]),
                         ptx::pack_bf16(a[12], a[13]));
  }
}

// A store of 8 bytes a lane covers four rows at a time, which the swizzle alone would leave on half of the
// banks: odd rows take the columns in another order.
__device__ __forceinline__ void fill_slab(u32 slab, const float* acc, int half, int lane, const float*) {
  const int row = lane / 4;
  const bool odd = row % 2 != 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float *even_row = acc + i * 4 + half * 2, *odd_row = acc + (i ^ 2) * 4 + half * 2;
    const int chunk = (odd ? i ^ 2 : i) * 2 + lane % 4 / 2;
    ptx::store_shared_2(slab + row * 128 + (chunk ^ row) * 16 + lane % 2 * 8, odd ? odd_row[0] : even_row[0],
                        odd ? odd_row[1] : even_row[1]);
  }
}

// This warp's part of the staging memory, 1024-byte aligned.
template <class C>
__device__ __forceinline__ u32 slabs_of_warp(u32 smem) {
  return smem + Layout<C>::kStaging + ptx::thread_index() / 32 * C::SLABS * kSlabBytes;
}

template <class C, class E>
__device__ __forceinline__ void store_slabs(const float (&acc)[kCols<C> / 2], const TensorMap& d_map,
                                            u32 slabs, const Tile& tile, int first_row) {
  constexpr int kWidth = kSlabCols<C>, kSlabs = kCols<C> / kWidth * 2;
  constexpr int kBatch = C::SLABS == kSlabs ? kSlabs : C::SLABS / 2;  // slabs filled and handed over together
  static_assert(kSlabs % C::SLABS == 0 && C::SLABS % kBatch == 0, "every tile begins with the same half");
  const int thread = ptx::thread_index(), lane = thread % 32, row = first_row + thread / 32 % 4 * 16;
  const int end = tile.half ? kSlabs / 2 : kSlabs;
#pragma unroll
  for (int first = 0; first < kSlabs; first += kBatch) {
    if (first >= end) break;
    const u32 batch = slabs + first % C::SLABS * kSlabBytes;
    ptx::tma_store_wait_read<C::SLABS / kBatch - 1>();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      fill_slab(batch + i * kSlabBytes, acc + (first + i) / 2 * (kWidth / 2), (first + i) % 2, lane,
                static_cast<const typename C::Out*>(nullptr));
    ptx::fence_proxy_async();
    __syncwarp();
    if (ptx::elect()) {
#pragma unroll
      for (int i = 0; i < kBatch && first + i < end; ++i) {
        const int x = E::column(tile.col + (first + i) / 2 * kWidth), y = row + (first + i) % 2 * kSlabRows;
        if constexpr (C::REDUCE)
          ptx::tma_reduce_add(d_map, batch + i * kSlabBytes, x, y, tile.batch);
        else
          ptx::tma_store(d_map, batch + i * kSlabBytes, x, y, tile.batch);
      }
      ptx::tma_store_commit();
    }
  }
}

// The end of a tile, d and c its matrices. Rows from p.m on are not written; TMA clips them where they are
// the last of the matrix too. A BF16 accumulator meets C here, an FP8 one began with it unless it was
// changed.
template <class C, class E = AsItIs>
__device__ __forceinline__ void store_tile(float (&acc)[kCols<C> / 2], const TensorMap* d_map,
                                           typename C::Out* d, const typename C::Out* c, u32 slabs,
                                           const Extents& p, const Tile& tile, int first_row) {
  constexpr bool kAdd = C::ADD && (!Layout<C>::kFp8 || E::kChanges);
  if constexpr (kAdd && C::EVEN_N && !C::TMA_STORE) {
    store_sum<C>(acc, d, c, p, tile, first_row);
    return;
  }
  if constexpr (kAdd && (!C::EVEN_N || C::TMA_STORE)) add_c<C, false>(acc, c, p, tile, first_row);
  if constexpr (C::TMA_STORE) {
    constexpr int kWhole = kCols<C> / kSlabCols<C> * kSlabCols<C>;
    store_slabs<C, E>(acc, *d_map, slabs, tile, first_row);
    if constexpr (kWhole < kCols<C>) store_direct<C, kWhole>(acc, d, p, tile, first_row);
  } else if constexpr (!kAdd || !C::EVEN_N) {
    store_direct<C>(acc, d, p, tile, first_row);
  }
}

}  // namespace jdg
