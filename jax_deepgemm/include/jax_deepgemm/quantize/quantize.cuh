// x [rows, cols] in FP8: one tile of 128 x 128 per block of 256 threads; where 1x128 scales are all, up to
// eight lower tiles side by side.
//
//   8 loads of 16 bytes per thread (of bf16; a half warp reads 256 bytes of a row)  ->  quantize_tile.cuh
//
// Each tile is read once and written once (twice with the transposed copy); several blocks per SM hide each
// other's latency. Rows that do not count are not read: those from *limit on, or what a table of row blocks
// says (BLOCKED: a tile for each of its entries). With INDEXED a row is read where the index says.
//
// quantize_stream (BLOCKED, numbers of 16 bits): as many blocks of threads as run at once walk over the
// tiles; while a tile is quantised and stored, cp.async brings the next one's rows, and loads its index.
//   shared memory: rows [8 of a thread][256 threads] of 16 bytes | TileShared
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
  int stripe;  // with an index: so many columns of tiles are done before the next ones
};

// The number, line by line, of the number-th tile in stripes. A row of x that several rows are copies of is
// then read from L2 by all but the first of them: of all columns, x would not stay there.
template <class C>
__device__ __forceinline__ int striped(int number, int stripe, int lines, int cols) {
  if constexpr (!C::INDEXED) return number;
  const u32 across = max(ceil_div(cols, C::TILES * kTile), 1), size = stripe * lines;
  const u32 before = static_cast<u32>(number) / size, left = number - before * size;
  const u32 mine = min(static_cast<u32>(stripe), across - before * stripe), line = left / mine;
  return line * across + before * stripe + left - line * mine;
}

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
  const Quantized to = all.of_batch<C>(at.batch, scales_per_matrix<C>(all.rows, all.cols));

  const i64 first = static_cast<i64>(at.batch * in.batched) * in.sources + at.row;
  const typename C::In* line = in.x + first * all.cols + at.col;
  Chunk<typename C::In> v[C::TILES][C::ROWS];
#pragma unroll
  for (int j = 0; j < C::ROWS; ++j, line += all.cols) {
    bool there = at.row + j < at.counted;
    if constexpr (C::INDEXED) there = find_row(line, in, at, at.row + j, all.cols);
#pragma unroll
    for (int tile = 0; tile < C::TILES; ++tile)
      load_chunk<typename C::In, C::ALIGNED, C::INDEXED>(v[tile][j], line + tile * kTile, there,
                                                         all.cols - at.col - tile * kTile);
  }
  quantize_tiles<C>(v, shared, to, at, kTile);
}

// A thread copies what it will read itself: no barrier between.
template <class C>
struct StreamShared {
  static constexpr int kThreads = kTile / C::ROWS * 16;
  uint4 slots[C::ROWS][kThreads];
  TileShared<C> tile;
};

// Lane l's part of the index: of the l % ROWS-th row of the thread.
template <class C>
__device__ __forceinline__ int request_index(const QuantizeInputs<typename C::In>& in, const Place& at) {
  const int row = at.row + static_cast<int>(threadIdx.x) % C::ROWS;
  if (at.empty() || row >= at.counted) return -1;
  return C::INDEXED ? in.index[row] : row;
}

template <class C>
__device__ __forceinline__ void request_rows(const QuantizeInputs<typename C::In>& in,
                                             StreamShared<C>& shared, const Place& at, int index, int cols) {
#pragma unroll
  for (int j = 0; j < C::ROWS; ++j) {
    const int source = __shfl_sync(kEveryLane, index, (threadIdx.x & 16) | j);
    const bool there = static_cast<u32>(source) < static_cast<u32>(in.sources) && at.col < cols;
    const i64 first = there ? static_cast<i64>(source) * cols + at.col : 0;
    ptx::copy_async(smem_address(&shared.slots[j][threadIdx.x]), in.x + first, there ? 16 : 0);
  }
  ptx::copy_async_commit();
}

// The rows of the tile of this number, and the thread's place in it; without rows if there is none.
template <class C>
__device__ __forceinline__ Place listed_place(const CountedRows& counted, const Quantized& to, int stripe,
                                              int number, int tiles) {
  const int last = min(number, tiles - 1);
  Place at = Place::of<C>(striped<C>(last, stripe, to.rows_t / kTile, to.cols), to.rows, to.cols);
  at = at.within<C>(at.listed<C>(counted.blocks));
  if (number >= tiles) at.end = at.tile_row;
  return at;
}

template <QuantizeConfig C>
__device__ __forceinline__ void quantize_stream(const QuantizeInputs<typename C::In>& in,
                                                const CountedRows& counted, const Quantized& to, int tiles) {
  static_assert(C::BLOCKED && C::ALIGNED && C::ROWS == 8);
  extern __shared__ __align__(16) char memory[];
  StreamShared<C>& shared = *reinterpret_cast<StreamShared<C>*>(memory);
  const auto place = [&](int number) { return listed_place<C>(counted, to, in.stripe, number, tiles); };
  int number = blockIdx.x;
  Place at = place(number);
  request_rows<C>(in, shared, at, request_index<C>(in, at), to.cols);
  int index = request_index<C>(in, place(number + gridDim.x));
  for (; number < tiles; number += gridDim.x) {
    Chunk<typename C::In> v[1][C::ROWS];
    ptx::copy_async_wait();
#pragma unroll
    for (int j = 0; j < C::ROWS; ++j)
      v[0][j].take(ptx::load_shared_16(smem_address(&shared.slots[j][threadIdx.x])));
    request_rows<C>(in, shared, place(number + gridDim.x), index, to.cols);
    index = request_index<C>(in, place(number + 2 * gridDim.x));
    if (!at.empty()) quantize_tiles<C>(v, shared.tile, to, at, 0);
    at = place(number + gridDim.x);
  }
}

}  // namespace jdg
