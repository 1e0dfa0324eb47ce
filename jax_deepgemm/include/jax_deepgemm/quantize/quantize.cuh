// x [rows, cols] in FP8: one tile of 128 x 128 per block of 256 threads; where 1x128 scales are all, up to
// eight lower tiles side by side.
//
//   8 loads of 16 bytes per thread (of bf16; a half warp reads 256 bytes of a row)  ->  quantize_tile.cuh
//
// Each tile is read once and written once (twice with the transposed copy); several blocks per SM hide each
// other's latency. Rows from *limit on count as zeros and are not read.
#pragma once

#include <jax_deepgemm/quantize/quantize_tile.cuh>

namespace jdg {

// Rows that count: up to *limit, if there is one. The compiler may not know that they are all of them, or it
// keeps the comparisons of the loads for the stores, in registers that it lacks.
__device__ __forceinline__ int counted_rows(const int* limit, int rows) {
  u32 counted = limit == nullptr ? rows : min(*limit, rows);
  ptx::forget(counted);
  return static_cast<int>(counted);
}

template <class C>
__device__ __forceinline__ int scales_per_matrix(int rows, int cols) {
  return (C::SCALES == Scales::kRow ? rows : ceil_div(rows, kTile)) *
         (C::SCALES == Scales::kColumn ? cols : ceil_div(cols, kTile));
}

// batched_*: 1 where each matrix of the batch has its own, 0 where they share one.
template <QuantizeConfig C>
__device__ __forceinline__ void quantize(const typename C::In* x, const int* limit, const Quantized& all,
                                         int batched_x, int batched_limit) {
  __shared__ TileShared<C> shared;
  const Place at = Place::of<C>(blockIdx.x, all.rows, all.cols, C::TILES);
  const Quantized to = all.of_batch(at.batch, scales_per_matrix<C>(all.rows, all.cols));
  const int rows = counted_rows(limit == nullptr ? limit : limit + at.batch * batched_limit, all.rows);

  const i64 first = static_cast<i64>(at.batch * batched_x) * all.rows + at.row;
  const typename C::In* line = x + first * all.cols + at.col;
  Chunk<typename C::In> v[C::TILES][C::ROWS];
#pragma unroll
  for (int j = 0; j < C::ROWS; ++j, line += all.cols) {
#pragma unroll
    for (int tile = 0; tile < C::TILES; ++tile)
      load_chunk<typename C::In, C::ALIGNED>(v[tile][j], line + tile * kTile, at.row + j < rows,
                                             all.cols - at.col - tile * kTile);
  }
  quantize_tiles<C>(v, shared, to, at, kTile);
}

}  // namespace jdg
