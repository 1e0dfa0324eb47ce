// x [rows, cols] in FP8 with scales of 1x32 or 32x32: 32 rows by 128 columns for each block of threads.
//
// clang-format off
//   a warp           32 rows by 32 columns
//   a lane           rows lane / 4 + 8 j for its four j, 8 columns from lane % 4 * 8
//   1x32 scales      amax of a row: four lanes exchange their maxima
//   32x32 scales     amax of all: 32 lanes do
// clang-format on
//
// No shared memory, no barrier: a warp needs nothing of the others. A row of a warp is 64 bytes of bf16 and
// 32 of values, whole sectors. Arithmetic is that of quantize_tile.cuh.
#pragma once

#include <jax_deepgemm/quantize/quantize_tile.cuh>

namespace jdg {

constexpr int kFine = 32;  // columns under one scale, and rows of a warp

// The largest of COUNT neighbouring lanes.
template <int COUNT>
__device__ __forceinline__ float largest_of_lanes(float v) {
#pragma unroll
  for (int apart = COUNT / 2; apart > 0; apart /= 2) v = fmaxf(v, __shfl_xor_sync(kEveryLane, v, apart));
  return v;
}

// batched: 1 where each matrix has its own x, 0 where they share one.
template <QuantizeConfig C>
__device__ __forceinline__ void quantize_fine(const typename C::In* x, int batched, const Quantized& all) {
  constexpr bool kBlock = C::SCALES == Scales::kBlock;
  static_assert(C::HEIGHT == kFine && C::ROWS == 4 && C::TILES == 1);
  const Place tile = Place::of<C>(blockIdx.x, all.rows, all.cols);
  const int lane = threadIdx.x % 32, first_col = tile.tile_col + static_cast<int>(threadIdx.x) / 32 * kFine;
  if (first_col >= all.cols) return;
  const int across = ceil_div(all.cols, kFine);
  const Quantized to = all.of_batch<C>(tile.batch, (kBlock ? ceil_div(all.rows, kFine) : all.rows) * across);
  const int row = tile.tile_row + lane / 4, col = first_col + lane % 4 * kWide, left = all.cols - col;
  const i64 first = static_cast<i64>(row) * all.cols + col;
  x += static_cast<i64>(tile.batch * batched) * all.rows * all.cols + first;

  Chunk<typename C::In> v[C::ROWS];
#pragma unroll
  for (int j = 0; j < C::ROWS; ++j)
    load_chunk<typename C::In, C::ALIGNED>(v[j], x + static_cast<i64>(8 * j) * all.cols,
                                           row + 8 * j < all.rows, left);
  if constexpr (!C::Fp8::kHasInfinity) {
#pragma unroll
    for (int j = 0; j < C::ROWS; ++j) v[j].infinities_to_nan();
  }
  Maxima<C::ROWS> maxima;
  find_maxima<true>(maxima, v);
  float block = 0.0f;
#pragma unroll
  for (int j = 0; j < C::ROWS; ++j) block = fmaxf(block, maxima.row[j]);
  if constexpr (kBlock) {
    block = scale_of<C>(largest_of_lanes<32>(block));
    if (lane == 0) to.scales[static_cast<i64>(row / kFine) * across + first_col / kFine] = block;
  }
#pragma unroll
  for (int j = 0; j < C::ROWS; ++j) {
    const bool inside = row + 8 * j < all.rows;
    const float scale = kBlock ? block : scale_of<C>(largest_of_lanes<4>(maxima.row[j]));
    if (!kBlock && inside && lane % 4 == 0)
      to.scales[static_cast<i64>(row + 8 * j) * across + first_col / kFine] = scale;
    const float inverse = ptx::rcp_rn(scale);
    float scaled[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) scaled[i] = ptx::mul_ftz(v[j][i], inverse);
    const uint2 bytes = {pack_four<typename C::Fp8>(scaled[0], scaled[1], scaled[2], scaled[3]),
                         pack_four<typename C::Fp8>(scaled[4], scaled[5], scaled[6], scaled[7])};
    if (inside) store_bytes<C::ALIGNED>(to.values + first + static_cast<i64>(8 * j) * all.cols, bytes, left);
  }
}

}  // namespace jdg
