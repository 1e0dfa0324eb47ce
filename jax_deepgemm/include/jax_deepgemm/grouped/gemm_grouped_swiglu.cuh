// Grouped FP8 GEMM whose result is not h = A B^T but its SwiGLU, quantised: h never reaches memory.
//
// clang-format off
//   h        = rows * B[group]^T              gate | up, rounded to bfloat16 as if it were stored
//   act      = silu(gate) * up * weight[row]  float32
//   values   = act / scale in E4M3            one scale for each row and 128 features
// clang-format on
//
// The kernel is that of gemm_grouped.cuh, with two differences. A tile's columns are the 128 rows of B that
// make gate of its features, and behind them the 128 that make up: one TMA box of a map [group, gate or up,
// feature, k], and one of their scales. They are multiplied in two passes, so that a thread's accumulator
// holds gate and up of the same 2 x 32 elements, and the epilogue needs nobody else but for a row's maximum,
// which the four lanes of a quad share.
//
// clang-format off
//   epilogue of a warp, 16 rows     accumulator -> act, in its place -> maxima -> scales
//                                   -> values in this warp's slab [16][128 bytes] -> 16 bytes a lane -> memory
// clang-format on
//
// Rows behind a group's last one are zeros up to where the next one's rows begin, as in gemm_grouped.cuh.
// The slab is written and read by ordinary instructions of one warp: __syncwarp orders them, and no TMA
// reads it. Its 16-byte chunks are exchanged by row against bank conflicts.
//
// Arithmetic is that of activation.cuh and quantize_tile.cuh, so results are those of the kernels in a row,
// bit for bit.
#pragma once

#include <jax_deepgemm/gemm/quantized.cuh>
#include <jax_deepgemm/grouped/gemm_grouped.cuh>
#include <jax_deepgemm/swiglu/activation.cuh>

namespace jdg {

// What is written, [rows, width] and [rows, pitch], and the factors of the rows. pitch: width / 128, in a
// chain rounded up to whole 16 bytes, as the next GEMM's TMA wants it.
struct SwigluResult {
  u8* values;
  float* scales;
  const float* weights;
  const float* bias;  // [groups of B, 2 * width], gate | up; BIASED
  int width, pitch;

  // Of the matrix that begins `rows` further on.
  __device__ __forceinline__ SwigluResult from(i64 rows) const {
    return {values + rows * width, scales + rows * pitch, weights + rows, bias, width, pitch};
  }
};

// The factor of a row; in a chain past L1 (gemm_grouped.cuh).
template <class C>
__device__ __forceinline__ float weight_of(const SwigluResult& to, int row) {
  if constexpr (!C::CHAINED) return to.weights[row];
  return __uint_as_float(ptx::load_shared_by_blocks(reinterpret_cast<const int*>(to.weights + row)));
}

// What becomes of h (activation.cuh).
struct PlainSilu {
  static constexpr Function FUNCTION = Function::kSilu;
  static constexpr float LIMIT = kInfinity, ALPHA = 1.0f, SHIFT = 0.0f;
  static constexpr bool INTERLEAVED = false;
};

// Two numbers of a thread's accumulator as bfloat16 would hold them.
__device__ __forceinline__ float2 rounded(const float* pair) {
  const u32 packed = ptx::pack_bf16(pair[0], pair[1]);
  return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xFFFF0000u)};
}

// The same plus a bias, rounded again.
__device__ __forceinline__ float2 biased(const float2& pair, const float2& bias) {
  const float sums[2] = {pair.x + bias.x, pair.y + bias.y};
  return rounded(sums);
}

// acc[.. COUNT / 2) = SwiGLU of it and of the other half; zeros in rows that do not count. bias: of gate at
// this thread's first column, that of up `width` further on.
template <bool BIASED, int COUNT>
__device__ __forceinline__ void activate(float (&acc)[COUNT], const TwoRows& weight, bool upper_counts,
                                         bool lower_counts, const float* bias, int width) {
  float2 of_gate, of_up;
#pragma unroll
  for (int i = 0; i < COUNT / 2; i += 2) {
    float2 gate = rounded(acc + i), up = rounded(acc + COUNT / 2 + i);
    if constexpr (BIASED) {
      if (i % 4 == 0) {
        of_gate = *reinterpret_cast<const float2*>(bias + i * 2);
        of_up = *reinterpret_cast<const float2*>(bias + width + i * 2);
      }
      gate = biased(gate, of_gate), up = biased(up, of_up);
    }
    const bool counts = i / 2 % 2 ? lower_counts : upper_counts;
    acc[i] = counts ? Activated<PlainSilu>(gate.x).value * up.x * weight.of(i) : 0.0f;
    acc[i + 1] = counts ? Activated<PlainSilu>(gate.y).value * up.y * weight.of(i) : 0.0f;
  }
}

template <class C>
struct SwigluTiles : GroupedTiles<C> {
  using Work = TileRecord;
  using GroupedTiles<C>::in, GroupedTiles<C>::p, GroupedTiles<C>::table;
  static_assert(C::GATED && C::COLS == 2 * kTile && C::PASSES == 2 && C::ACROSS == 1 && kParts<C> == 1,
                "a thread has gate and up of the same elements");
  static_assert(C::SLABS == 2, "a warp's slab");

  const SwigluResult all;

  __device__ __forceinline__ void store(MainLoop<C>& loop, const TileRecord& record) const {
    float (&acc)[C::COLS / 2] = loop.acc[0];
    const GroupTile mine = group_tile<C>(table, record, p, in.k_blocks);
    const int warp = ptx::thread_index() / 32, lane = ptx::thread_index() % 32;
    const int first_row = record.row + warp * 16, upper = first_row + lane / 4, lower = upper + 8;
    if (whole_warp(first_row >= mine.zeros_end)) return;
    const i64 before = GroupTable<C>::kRowsInGroups ? 0 : static_cast<i64>(mine.tile.batch) * p.m;
    const SwigluResult to = all.from(before);

    const bool upper_counts = upper < mine.rows_end, lower_counts = lower < mine.rows_end;
    const TwoRows weight = {upper_counts ? weight_of<C>(to, upper) : 0.0f,
                            lower_counts ? weight_of<C>(to, lower) : 0.0f};
    const int feature = mine.tile.col / 2, block = feature / kTile;
    const float* bias = to.bias;
    if constexpr (C::BIASED) {
      const i64 group = max(mine.tile.col_batch, 0);  // of rows that do not count: none
      bias += group * 2 * to.width + feature + lane % 4 * 2;
    }
    activate<C::BIASED>(acc, weight, upper_counts, lower_counts, bias, to.width);
    const TwoRows scales = act_scales(acc);

    if (lane % 4 == 0) {
      if (upper < mine.zeros_end) to.scales[static_cast<i64>(upper) * to.pitch + block] = scales.upper;
      if (lower < mine.zeros_end) to.scales[static_cast<i64>(lower) * to.pitch + block] = scales.lower;
    }
    const u32 slab = slabs_of_warp<C>(loop.ring.smem);
    __syncwarp();  // all lanes have read what the tile before left there
    fill_act_slab(slab, acc, scales);
    __syncwarp();
    store_act_slab<false>(slab, to.values, to.width, first_row, mine.zeros_end, feature);
  }
};

template <class C>
  requires GemmConfig<C> && GroupedConfig<C>
__device__ __forceinline__ void gemm_grouped_swiglu(const Operands& in, const Groups& groups,
                                                    const Extents& p, const SwigluResult& to) {
  persistent<C>(SwigluTiles<C>{{in, groups, p, nullptr, nullptr, nullptr, {}, {}}, to});
}

}  // namespace jdg
