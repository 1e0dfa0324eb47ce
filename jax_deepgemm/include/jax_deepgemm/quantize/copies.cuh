// x [sources, cols] in FP8 with 1x128 scales, each row written to wherever copies of it are wanted: to
// position[i, s] for each s. Rows that the index says are copies of none are written as rows of zeros are.
// A row is read and quantised once, however many copies it has.
//
//   a half warp  ROWS rows of TILES tiles side by side, as in quantize_tile.cuh: maxima, scales and inverses
//                by shuffles, values packed in registers, and stored once for each copy, scales with them.
//                Then its share of the result: rows [i * share, (i + 1) * share) for row i, of which it
//                fills those that are copies of none
//
// No shared memory, no barriers. index and position are inverse to each other, so no row has two writers;
// positions outside of the result are skipped. All lanes of a warp shuffle alike: what differs between its
// halves is only which of them store.
#pragma once

#include <jax_deepgemm/quantize/quantize.cuh>

namespace jdg {

struct Copies {
  const int* position;  // [sources, slots]
  int slots, rows;      // rows: of the result
  int share;            // ceil(rows / sources)
};

// What a thread has of one row of x and of each of its copies.
template <class C>
struct CopiedRow {
  uint2 bytes[C::TILES];
  float scale;  // of tile `tile`, where this thread stores it
  int tile;
  bool scales;

  __device__ __forceinline__ void store(const Quantized& to, int row, int col, int across) const {
    u8* line = to.values + static_cast<i64>(row) * to.cols + col;
#pragma unroll
    for (int i = 0; i < C::TILES; ++i)
      store_bytes<C::ALIGNED>(line + i * kTile, bytes[i], to.cols - col - i * kTile);
    if (scales) to.scales[static_cast<i64>(row) * across + tile] = scale;
  }
};

// The row-th row of x, if it is there, to its copies, whose places 16 lanes read at a time.
template <class C>
__device__ __forceinline__ void store_copies(const CopiedRow<C>& copy, const Copies& copies, i64 row,
                                             bool there, const Quantized& to, int col, int across) {
  const int lane = static_cast<int>(threadIdx.x) % 16;
  for (int first = 0; first < copies.slots; first += 16) {
    const bool listed = there && first + lane < copies.slots;
    const int mine = listed ? copies.position[row * copies.slots + first + lane] : -1;
    const int count = min(copies.slots - first, 16);
    for (int s = 0; s < count; ++s) {
      const int target = __shfl_sync(kEveryLane, mine, (threadIdx.x & 16) | s);
      if (static_cast<u32>(target) < static_cast<u32>(copies.rows)) copy.store(to, target, col, across);
    }
  }
}

// Zeros into the row's share of the result, where rows are copies of none.
template <class C>
__device__ __forceinline__ void store_zeros(CopiedRow<C> zeros, const int* index, const Copies& copies,
                                            i64 row, bool there, u32 sources, const Quantized& to, int col,
                                            int across) {
  const int lane = static_cast<int>(threadIdx.x) % 16;
#pragma unroll
  for (int i = 0; i < C::TILES; ++i) zeros.bytes[i] = {0, 0};
  zeros.scale = scale_of<C>(0.0f);
  for (int first = 0; first < copies.share; first += 16) {
    const i64 begin = row * copies.share + first, mine = begin + lane;
    const bool listed = there && first + lane < copies.share && mine < copies.rows;
    const bool empty = listed && static_cast<u32>(index[mine]) >= sources;
    u32 left = __ballot_sync(kEveryLane, empty) >> (threadIdx.x & 16) & 0xFFFF;
    for (; left != 0; left &= left - 1)
      zeros.store(to, static_cast<int>(begin) + __ffs(left) - 1, col, across);
  }
}

template <QuantizeConfig C>
__device__ __forceinline__ void quantize_copies(const QuantizeInputs<typename C::In>& in,
                                                const Copies& copies, const Quantized& to) {
  static_assert(C::SCALES == Scales::kRow && !C::TRANSPOSED && C::ROWS * C::TILES <= 16);
  const Place at = Place::of<C>(blockIdx.x, in.sources, to.cols, C::TILES);
  const typename C::In* line = in.x + static_cast<i64>(at.row) * to.cols + at.col;
  Chunk<typename C::In> v[C::TILES][C::ROWS];
#pragma unroll
  for (int j = 0; j < C::ROWS; ++j, line += to.cols) {
#pragma unroll
    for (int tile = 0; tile < C::TILES; ++tile)
      load_chunk<typename C::In, C::ALIGNED>(v[tile][j], line + tile * kTile, at.row + j < in.sources,
                                             to.cols - at.col - tile * kTile);
  }
  Maxima<C::ROWS> maxima[C::TILES];
  find_finite_maxima<C>(maxima, v);
  float inverse[C::ROWS * C::TILES];
#pragma unroll
  for (int i = 0; i < C::ROWS * C::TILES; ++i) inverse[i] = maxima[i % C::TILES].row[i / C::TILES];
  const float scale = scale_of<C>(combine_lanes(inverse, [](float a, float b) { return fmaxf(a, b); }));
  spread_lanes(inverse, ptx::rcp_rn(scale));

  const int lane = static_cast<int>(threadIdx.x) % 16, across = ceil_div(to.cols, kTile);
  CopiedRow<C> copy;
  copy.scale = scale;
  copy.tile = at.tile_col / kTile + lane % C::TILES;
#pragma unroll
  for (int j = 0; j < C::ROWS; ++j) {
    copy.scales = lane / C::TILES == j && copy.tile < across;
#pragma unroll
    for (int tile = 0; tile < C::TILES; ++tile) {
      float x[kWide];
#pragma unroll
      for (int i = 0; i < kWide; ++i) x[i] = ptx::mul_ftz(v[tile][j][i], inverse[j * C::TILES + tile]);
      copy.bytes[tile] = {pack_four<typename C::Fp8>(x[0], x[1], x[2], x[3]),
                          pack_four<typename C::Fp8>(x[4], x[5], x[6], x[7])};
    }
    const bool there = at.row + j < in.sources;
    store_copies<C>(copy, copies, at.row + j, there, to, at.col, across);
    store_zeros<C>(copy, in.index, copies, at.row + j, there, in.sources, to, at.col, across);
  }
}

}  // namespace jdg
