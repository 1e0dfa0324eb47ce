// Rows of an indexer's queries or keys, rotated by a Hadamard matrix, in FP8 with one scale for each row.
//
//   x [rows, D]  ->  values [rows, D] e4m3, scales [rows] float32; or both where the row's slot of a cache is
//
//   D / 8 lanes  one row, 8 neighbours each: sums and differences of neighbours 1, 2, 4 apart in registers,
//   of
//                lanes 1, 2, 4, 8 apart by shuffles, then one factor that makes the matrix orthonormal; the
//                largest magnitude of all lanes is the scale's
//   a thread     its part of HELD rows, all loaded before the first is rotated
//
// A cache has pages of some slots; slot s is the (s % page)-th of page s / page. Slots outside of it are
// skipped. No shared memory, nothing waits for another.
#pragma once

#include <jax_deepgemm/quantize/chunk.cuh>

namespace jdg {

// What a kernel is told at compile time; ops/indexer_quantize/sm90.py writes it as `struct Config`.
// clang-format off
template <class C>
concept RotateConfig = requires {
  typename C::In;  // dtype of x
  C::D;            // columns, 32, 64 or 128
  C::ROTATED;      // bool: whether rows are rotated
  C::POWERS;       // bool: scales are powers of two
  C::SLOTS;        // bool: rows go to slots of a cache
};
// clang-format on

constexpr int kRotateThreads = 256, kHeld = 4;
constexpr u32 kLanesOfWarp = 0xFFFFFFFF;

struct Rotated {
  char *values, *scales;
  const int* slots;
  i64 value_page, scale_page;  // bytes from a page to the next; of no cache: 0
  int page, capacity;          // slots of a page, and of all
};

// Where 1 / sqrt(D) is no power of two, rounded to nearest.
template <int D>
constexpr float kUnit = D == 128  ? 0.088388347648318447f
                        : D == 64 ? 0.125f
                                  : 0.17677669529663689f;

// One step of the transform: all that are `step` lanes apart.
template <int STEP>
__device__ __forceinline__ void between_lanes(float (&v)[kWide], int lane) {
#pragma unroll
  for (int i = 0; i < kWide; ++i) {
    const float other = __shfl_xor_sync(kLanesOfWarp, v[i], STEP);
    v[i] = lane & STEP ? other - v[i] : v[i] + other;
  }
}

template <int STEP>
__device__ __forceinline__ void within_lane(float (&v)[kWide]) {
#pragma unroll
  for (int pair = 0; pair < kWide / 2; ++pair) {
    const int i = pair / STEP * 2 * STEP + pair % STEP;
    const float a = v[i], b = v[i + STEP];
    v[i] = a + b, v[i + STEP] = a - b;
  }
}

template <int D>
__device__ __forceinline__ void rotate(float (&v)[kWide], int lane) {
  within_lane<1>(v), within_lane<2>(v), within_lane<4>(v);
  if constexpr (D > 8) between_lanes<1>(v, lane);
  if constexpr (D > 16) between_lanes<2>(v, lane);
  if constexpr (D > 32) between_lanes<4>(v, lane);
  if constexpr (D > 64) between_lanes<8>(v, lane);
#pragma unroll
  for (int i = 0; i < kWide; ++i) v[i] *= kUnit<D>;
}

// amax / 448, at least the smallest normal number, of the row that a lane has a part of.
template <int D, bool POWERS>
__device__ __forceinline__ float scale_of(const float (&v)[kWide]) {
  float amax = E4m3::kMax * 0x1p-126f;
#pragma unroll
  for (int i = 0; i < kWide; ++i) amax = fabsf(v[i]) < kInfinity ? fmaxf(amax, fabsf(v[i])) : amax;
#pragma unroll
  for (int step = 1; step < D / kWide; step *= 2)
    amax = fmaxf(amax, __shfl_xor_sync(kLanesOfWarp, amax, step));
  const float scale = ptx::div_rn(amax, E4m3::kMax);
  if constexpr (!POWERS) return scale;
  const u32 bits = __float_as_uint(scale);
  return __uint_as_float((bits + 0x7FFFFFu) & 0xFF800000u);
}

template <RotateConfig C>
__device__ __forceinline__ void store(const Rotated& to, int row, int part, const float (&v)[kWide],
                                      float scale) {
  int slot = row;
  if constexpr (C::SLOTS) {
    slot = to.slots[row];
    if (static_cast<u32>(slot) >= static_cast<u32>(to.capacity)) return;
  }
  const int page = C::SLOTS ? slot / to.page : 0, place = C::SLOTS ? slot - page * to.page : slot;
  const float inverse = ptx::rcp_rn(scale);
  float by[kWide];
#pragma unroll
  for (int i = 0; i < kWide; ++i)
    by[i] = fabsf(v[i]) == kInfinity ? __uint_as_float(0x7FC00000) : ptx::mul_ftz(v[i], inverse);
  const uint2 packed{pack_four<E4m3>(by[0], by[1], by[2], by[3]),
                     pack_four<E4m3>(by[4], by[5], by[6], by[7])};
  *reinterpret_cast<uint2*>(to.values + page * to.value_page + static_cast<i64>(place) * C::D +
                            part * kWide) = packed;
  if (part == 0)
    *reinterpret_cast<float*>(to.scales + page * to.scale_page + static_cast<i64>(place) * 4) = scale;
}

template <RotateConfig C>
__device__ __forceinline__ void rotate_rows(const typename C::In* x, int rows, const Rotated& to) {
  constexpr int kLanes = C::D / kWide, kRows = kRotateThreads / kLanes;
  const int part = static_cast<int>(threadIdx.x) % kLanes;
  const int first = static_cast<int>(blockIdx.x) * kRows * kHeld + static_cast<int>(threadIdx.x) / kLanes;
  Chunk<typename C::In> held[kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int row = first + j * kRows;
    held[j].clear();
    if (row < rows) held[j].load(x + static_cast<i64>(row) * C::D + part * kWide);
  }
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    float v[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) v[i] = held[j][i];
    if constexpr (C::ROTATED) rotate<C::D>(v, part);
    const float scale = scale_of<C::D, C::POWERS>(v);
    if (first + j * kRows < rows) store<C>(to, first + j * kRows, part, v, scale);
  }
}

}  // namespace jdg
