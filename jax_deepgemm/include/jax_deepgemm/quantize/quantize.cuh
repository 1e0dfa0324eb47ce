// x [rows, cols] in FP8: one tile of 128 x 128 per block of 256 threads; where 1x128 scales are all, up to
// eight lower tiles side by side.
//
//   8 loads of 16 bytes per thread (of bf16; a half warp reads 256 bytes of a row)  ->  quantize_tile.cuh
//
// Each tile is read once and written once (twice with the transposed copy); several blocks per SM hide each
// other's latency. Rows that do not count are not read: those from *limit on, or what a table of row blocks
// says (BLOCKED: a tile for each of its entries). With INDEXED a row is read where the index says.
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

// A place with the rows that it has and those that count.
template <class C>
__device__ __forceinline__ Place with_rows(const Place& tile, const CountedRows& of, int rows) {
  if constexpr (C::BLOCKED) return tile.within<C>(tile.listed<C>(of.blocks));
  Place at = tile;
  at.counted = counted_rows(C::LIMITED ? of.limit + at.batch * of.batched_limit : nullptr, rows);
  return at;
}

template <class C>
__device__ __forceinline__ int scales_per_matrix(int rows, int cols) {
  return (C::SCALES == Scales::kRow ? rows : ceil_div(rows, kTile)) *
         (C::SCALES == Scales::kColumn ? cols : ceil_div(cols, kTile));
}

// batched: 1 where each matrix of the batch has its own, 0 where they share one.
template <class In>
struct QuantizeInputs {
  const In* x;       // [sources, cols]
  const int* index;  // [rows], or null: row i of x
  int sources, batched;
};

// Whether there is a row of x for a row that is taken by the index, and where it begins.
template <class In>
__device__ __forceinline__ bool find_row(const In*& line, const QuantizeInputs<In>& in, const Place& at,
                                         int row, int cols) {
  const int source = row < at.counted ? in.index[row] : -1;
  line = in.x + static_cast<i64>(source) * cols + at.col;
  return static_cast<u32>(source) < static_cast<u32>(in.sources);
}

template <QuantizeConfig C>
__device__ __forceinline__ void quantize(const QuantizeInputs<typename C::In>& in, const CountedRows& counted,
                                         const Quantized& all) {
  __shared__ TileShared<C> shared;
  const Place at = with_rows<C>(Place::of<C>(blockIdx.x, all.rows, all.cols, C::TILES), counted, all.rows);
  if (C::BLOCKED && at.empty()) return;
  const Quantized to = all.of_batch(at.batch, scales_per_matrix<C>(all.rows, all.cols));

  const i64 first = static_cast<i64>(at.batch * in.batched) * in.sources + at.row;
  const typename C::In* line = in.x + first * all.cols + at.col;
  Chunk<typename C::In> v[C::TILES][C::ROWS];
#pragma unroll
  for (int j = 0; j < C::ROWS; ++j, line += all.cols) {
    bool there = at.row + j < at.counted;
    if constexpr (C::INDEXED) there = find_row(line, in, at, at.row + j, all.cols);
#pragma unroll
    for (int tile = 0; tile < C::TILES; ++tile)
      load_chunk<typename C::In, C::ALIGNED>(v[tile][j], line + tile * kTile, there,
                                             all.cols - at.col - tile * kTile);
  }
  quantize_tiles<C>(v, shared, to, at, kTile);
}

}  // namespace jdg
