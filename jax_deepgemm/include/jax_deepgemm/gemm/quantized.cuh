// A warp's 16 rows by 128 columns of an accumulator, quantised in FP8 with a scale for each row.
//
// clang-format off
//   maxima of rows, which the four lanes of a quad share -> scales
//   -> values in this warp's slab [16][128 bytes] -> 16 bytes a lane -> memory
// clang-format on
//
// The slab is written and read by ordinary instructions of one warp: __syncwarp orders them, and no TMA reads
// it. Its 16-byte chunks are exchanged by row against bank conflicts. Arithmetic is that of
// quantize_tile.cuh.
#pragma once

#include <jax_deepgemm/ptx/memory.cuh>
#include <jax_deepgemm/quantize/quantize.cuh>

namespace jdg {

constexpr int kActRows = 8, kActBytes = kActRows * kTile;

// How scales are made of maxima (quantize_tile.cuh).
struct ActScales {
  using Fp8 = E4m3;
  static constexpr float MIN_AMAX = 0.0f;
  static constexpr bool UE8M0 = false;
};

// A number for each of a thread's two rows, `upper` and, eight further on, `lower`.
struct TwoRows {
  float upper, lower;
  __device__ __forceinline__ float of(int i) const { return i / 2 % 2 ? lower : upper; }
};

template <int COUNT>
__device__ __forceinline__ TwoRows maxima(const float (&act)[COUNT]) {
  static_assert(COUNT >= kTile / 2, "a block of scales");
  TwoRows top = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kTile / 2; ++i) {
    float& of_row = i / 2 % 2 ? top.lower : top.upper;
    of_row = fmaxf(of_row, fabsf(act[i]));
  }
  return top;
}

// The scale of a row, of a quad's maxima.
__device__ __forceinline__ float quad_scale(float amax) {
  amax = fmaxf(amax, __shfl_xor_sync(kEveryLane, amax, 1));
  amax = fmaxf(amax, __shfl_xor_sync(kEveryLane, amax, 2));
  return scale_of<ActScales>(amax);
}

// The scales of a thread's rows. E4M3 has no infinity: it becomes NaN, which does not count.
template <int COUNT>
__device__ __forceinline__ TwoRows act_scales(float (&act)[COUNT]) {
  TwoRows top = maxima(act);
  if (__any_sync(kEveryLane, fmaxf(top.upper, top.lower) == kInfinity)) {
#pragma unroll
    for (int i = 0; i < kTile / 2; ++i)
      if (fabsf(act[i]) == kInfinity) act[i] = __uint_as_float(0x7FC00000);
    top = maxima(act);
  }
  return {quad_scale(top.upper), quad_scale(top.lower)};
}

// A warp's 16 rows of act into its slab: bytes of row r in chunks of 16 that are exchanged by r % 8.
template <int COUNT>
__device__ __forceinline__ void fill_act_slab(u32 slab, const float (&act)[COUNT], const TwoRows& scales) {
  const int lane = ptx::thread_index() % 32, row = lane / 4;
  const TwoRows inverse = {ptx::rcp_rn(scales.upper), ptx::rcp_rn(scales.lower)};
  const u32 line = slab + row * kTile + lane % 4 * 2;
  const auto put = [&](u32 at, const float* two, float by) {
    ptx::store_shared_pair(at, ptx::pack_e4m3(ptx::mul_ftz(two[0], by), ptx::mul_ftz(two[1], by)));
  };
#pragma unroll
  for (int eight = 0; eight < kTile / 8; ++eight) {
    const u32 at = line + (eight / 2 ^ row) * 16 + eight % 2 * 8;
    put(at, act + eight * 4, inverse.upper);
    put(at + kActBytes, act + eight * 4 + 2, inverse.lower);
  }
}

// A warp's slab to memory, of rows up to `rows_end`. TAILS: whether `width`, a multiple of 16, may end among
// its columns.
template <bool TAILS>
__device__ __forceinline__ void store_act_slab(u32 slab, u8* values, int width, int first_row, int rows_end,
                                               int feature) {
  const int lane = ptx::thread_index() % 32;
#pragma unroll
  for (int i = 0; i < 2 * kActRows * (kTile / 16) / 32; ++i) {
    const int row = i * 4 + lane / 8, chunk = lane % 8;
    const uint4 bytes = ptx::load_shared_16(slab + row * kTile + (chunk ^ row % 8) * 16);
    u8* at = values + static_cast<i64>(first_row + row) * width + feature + chunk * 16;
    if (TAILS && feature + chunk * 16 >= width) continue;
    if (first_row + row < rows_end) *reinterpret_cast<uint4*>(at) = bytes;
  }
}

}  // namespace jdg
