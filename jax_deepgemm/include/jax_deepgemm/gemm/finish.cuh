// What a product becomes before it is stored, in float32 and before the one rounding.
//
// clang-format off
//   x = ALPHA * sum + BIAS[column]        one fused multiply-add where there are both
//   x = f(x)                              EACH        (swiglu/activation.cuh)
//   x = f(gate) * (up + SHIFT)            IN_PAIRS    columns gate up gate up ..      D has half of the columns
//                                         IN_HALVES   gate | up, of tiles that are GATED
//   D = C + x
//   D[column + holes before it] = ..      HEADS       LEFT columns, a hole of MID columns, RIGHT columns, LEFT ..
// clang-format on
//
// In the persistent kernels that happens in the accumulator, whose first elements are then D's (IN_PAIRS),
// laid out as wgmma lays out an accumulator of D's columns: a thread has gate and up of the same feature, but
// every fourth feature of a row, and gets a neighbour's by shuffles. IN_HALVES it has them in the same place
// of both halves of the accumulator. In gemm_small_m.cuh a thread has four neighbours.
//
// Holes have what lay in D before or, with FILL, become zeros: a warp writes those of its rows that lie in
// front of a slab of its columns.
#pragma once

#include <jax_deepgemm/gemm/epilogue.cuh>
#include <jax_deepgemm/gemm/quantized.cuh>
#include <jax_deepgemm/swiglu/activation.cuh>

namespace jdg {

enum class Form { kNone, kEach, kInPairs, kInHalves };

// What a kernel is told at compile time; ops/gemm/sm90/source.py writes it as `struct Finish`.
// clang-format off
template <class F>
concept FinishConfig = requires {
  typename F::Act;          // Activation: what f is, if there is one
  F::FORM;                  // Form: of what it is
  F::ALPHA;                 // bool: whether sums are multiplied by a number
  F::BIAS;                  // bool: whether a number for each column is added
  F::LEFT, F::MID, F::RIGHT;  // columns of a head before, in and behind its hole; MID is 0 without heads
  F::QUANTIZED;             // bool: whether D is stored in FP8, with a scale for each row and 128 columns
  F::FILL;                  // bool: whether holes become zeros
};
// clang-format on

// A tile whose columns are D's: half as many.
template <class C>
struct HalfOf : C {
  static constexpr int COLS = C::COLS / 2;
};

template <class F>
struct Finish {
  static constexpr bool kPairs = F::FORM == Form::kInPairs, kHalves = F::FORM == Form::kInHalves;
  static constexpr bool kGated = kPairs || kHalves, kHeads = F::MID > 0;
  static constexpr bool kQuantized = F::QUANTIZED;
  static constexpr bool kChanges = F::ALPHA || F::BIAS || F::FORM != Form::kNone;
  using Of = Activated<typename F::Act>;

  const float* alpha;  // of each batch or group, or one of all
  const float* bias;   // [n], the same
  int batched_alpha, batched_bias;
  u8* values;     // QUANTIZED: [m, n], n a multiple of 16
  float* scales;  // [m, n / 128]

  template <class C>
  struct StoredAs {
    using Type = C;
  };
  template <class C>
    requires(kGated && sizeof(C) > 0)
  struct StoredAs<C> {
    using Type = HalfOf<C>;
  };

  // D's matrix of a product's.
  __device__ __forceinline__ static Extents stored(Extents p) {
    if constexpr (kGated) p.n /= 2;
    if constexpr (kHeads) p.n += p.n / (F::LEFT + F::RIGHT) * F::MID;
    return p;
  }
  __device__ __forceinline__ static Tile stored(Tile tile) {
    if constexpr (kGated) tile.col /= 2;
    return tile;
  }
  // Of the first of 64 columns, or of one of them.
  __device__ __forceinline__ static int column(int col) {
    if constexpr (kHeads) col += (col + F::RIGHT) / (F::LEFT + F::RIGHT) * F::MID;
    return col;
  }

  __device__ __forceinline__ Finish of(int batch, const Extents& p) const {
    return {alpha + batch * batched_alpha,
            bias + static_cast<i64>(batch * batched_bias) * p.n,
            0,
            0,
            values,
            scales};
  }

  __device__ __forceinline__ static float scaled(float sum, float by, float plus) {
    if constexpr (F::ALPHA && F::BIAS) return __fmaf_rn(sum, by, plus);
    if constexpr (F::ALPHA) return __fmul_rn(sum, by);
    if constexpr (F::BIAS) return __fadd_rn(sum, plus);
    return sum;
  }
  __device__ __forceinline__ static float each(float x) {
    if constexpr (F::FORM == Form::kEach) return Of(x).value;
    return x;
  }
  __device__ __forceinline__ static float pair(float gate, float up) {
    return __fmul_rn(Of(gate).value, Of::factor(up));
  }
  __device__ __forceinline__ float factor() const {
    if constexpr (F::ALPHA) return *alpha;
    return 1.0f;
  }

  // The bias of two neighbouring columns; zeros beyond the last one.
  template <bool EVEN_N>
  __device__ __forceinline__ float2 bias_of(int col, int n) const {
    float2 two = {0.0f, 0.0f};
    if constexpr (!F::BIAS) return two;
    if constexpr (EVEN_N) {
      if (col < n) two = ptx::load_in_order_2(bias + col);
    } else {
      if (col < n) two.x = ptx::load_in_order(bias + col);
      if (col + 1 < n) two.y = ptx::load_in_order(bias + col + 1);
    }
    return two;
  }

  // Brings the bias of a warp's columns, 32 bytes for a lane, from L2 to L1 at once.
  template <int COLS>
  __device__ __forceinline__ void touch_bias(int first, int n) const {
    const int col = first + ptx::thread_index() % 32 * 8;
    if (F::BIAS && col < min(first + COLS, n)) ptx::touch(bias + col);
  }

  // Of gate and, behind it, up of the same features, into the first half of the accumulator.
  template <class C>
  __device__ __forceinline__ void apply_halves(float (&acc)[kCols<C> / 2], const Extents& p,
                                               const Tile& tile) const {
    static_assert(C::GATED, "a thread has gate and up of the same features");
    constexpr int kHalf = kCols<C> / 4;
    const Fragment mine;
    // FP8, in two passes: scales of B are of whole blocks of features, so none of a tile's is beyond the
    // last.
    constexpr bool kWhole = C::PASSES == 2;
    const int width = p.n / 2, feature = tile.col / 2 + mine.col;
    const float* of_gate = bias + feature;
    const float* of_up = of_gate + width;
    if constexpr (F::BIAS) {  // half of the lanes that of gate, the others that of up
      const int lane = ptx::thread_index() % 32, at = tile.col / 2 + lane % 16 * 8;
      if (lane % 16 * 8 < kCols<C> / 2 && at < width) ptx::touch(bias + at + lane / 16 * width);
    }
#pragma unroll
    for (int i = 0; i < kHalf; i += 4) {
      __syncwarp();  // as below
      float by = 1.0f;
      if constexpr (F::ALPHA) by = ptx::load_in_order(alpha);  // no register is free for it all the time
      float2 first = {0.0f, 0.0f}, second = {0.0f, 0.0f};
      if constexpr (F::BIAS && kWhole) {
        first = ptx::load_in_order_2(of_gate + 2 * i), second = ptx::load_in_order_2(of_up + 2 * i);
      } else if constexpr (F::BIAS) {
        first = bias_of<C::EVEN_N>(feature + 2 * i, width);
        second = bias_of<C::EVEN_N>(feature + 2 * i < width ? width + feature + 2 * i : p.n, p.n);
      }
#pragma unroll
      for (int j = i; j < i + 4; j += 2) {
        acc[j] = pair(scaled(acc[j], by, first.x), scaled(acc[kHalf + j], by, second.x));
        acc[j + 1] = pair(scaled(acc[j + 1], by, first.y), scaled(acc[kHalf + j + 1], by, second.y));
      }
    }
  }

  // A tile's accumulator, in place; `tile` begins with this warpgroup's first column.
  template <class C>
  __device__ __forceinline__ void apply(float (&acc)[kCols<C> / 2], const Extents& p,
                                        const Tile& tile) const {
    if constexpr (kHalves) {
      apply_halves<C>(acc, p, tile);
      return;
    }
    const Fragment mine;
    const float by = factor();
    touch_bias<kCols<C>>(tile.col, p.n);
#pragma unroll
    for (int i = 0; i < kCols<C> / 2; i += 4) {
      if (i % 8 == 0) __syncwarp();  // ptxas would mix what all of them need beside the accumulator
      const float2 plus = bias_of < C::EVEN_N || kPairs > (tile.col + 2 * i + mine.col, p.n);
#pragma unroll
      for (int j = i; j < i + 4; j += 2) {
        const float first = scaled(acc[j], by, plus.x), second = scaled(acc[j + 1], by, plus.y);
        acc[j] = kPairs ? pair(first, second) : each(first);
        if constexpr (!kPairs) acc[j + 1] = each(second);
      }
    }
    if constexpr (kPairs) gather<kCols<C> / 2>(acc);
  }

  // From every other element, one of each of a thread's rows in 8 columns, to the accumulator of half as many
  // columns. Of 16 columns lane q of four has features q and 4 + q, and wants features 2q and 2q + 1. In the
  // first shuffle even lanes give their first one and odd lanes their second, in the other one the rest.
  template <int COUNT>
  __device__ __forceinline__ static void gather(float (&acc)[COUNT]) {
    static_assert(COUNT % 8 == 0, "two groups of eight columns");
    const int lane = ptx::thread_index() % 32, quad = lane / 4 * 4, q = lane % 4;
    const bool odd = q % 2 != 0, late = q >= 2;
    const int from = quad + (q % 2 * 2 + q / 2), other = from ^ 1;
#pragma unroll
    for (int i = 0; i < COUNT; i += 8) {
      float row[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float first = acc[i + 2 * half], second = acc[i + 4 + 2 * half];
        const float a = __shfl_sync(kEveryLane, odd ? second : first, from);
        const float b = __shfl_sync(kEveryLane, odd ? first : second, other);
        row[half][0] = late ? b : a, row[half][1] = late ? a : b;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
        acc[i / 2 + 2 * half] = row[half][0], acc[i / 2 + 2 * half + 1] = row[half][1];
    }
  }

  // Four neighbouring columns, of which the first 4, or 2 (IN_PAIRS), are then D's.
  __device__ __forceinline__ void apply(float (&values)[4], const Extents& p, int col) const {
    const float by = factor();
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float2 plus = bias_of<false>(col + i, p.n);
      const float first = scaled(values[i], by, plus.x), second = scaled(values[i + 1], by, plus.y);
      if constexpr (kPairs)
        values[i / 2] = pair(first, second);
      else
        values[i] = each(first), values[i + 1] = each(second);
    }
  }

  // A warp's rows of 128 columns, of a matrix D with `before` rows of others in front of it; rows from out.m
  // on are not written.
  __device__ __forceinline__ void store_quantized(float (&act)[kTile / 2], u32 slab, const Extents& out,
                                                  const Tile& tile, int first_row, i64 before) const {
    if (tile.col >= out.n) return;
    const int thread = ptx::thread_index(), lane = thread % 32, row = first_row + thread / 32 % 4 * 16;
    const int pitch = ceil_div(out.n, kTile), upper = row + lane / 4;
    const TwoRows of_rows = act_scales(act);
    if (lane % 4 == 0) {
      float* to = scales + (before + upper) * pitch + tile.col / kTile;
      if (upper < out.m) *to = of_rows.upper;
      if (upper + 8 < out.m) to[8 * static_cast<i64>(pitch)] = of_rows.lower;
    }
    __syncwarp();  // all lanes have read what the tile before left there
    fill_act_slab(slab, act, of_rows);
    __syncwarp();
    store_act_slab<true>(slab, values + before * out.n, out.n, row, out.m, tile.col);
  }

  // Whether a hole lies in front of this column, the first of 64, and where.
  __device__ __forceinline__ static bool behind_hole(int col, int n) {
    return kHeads && F::FILL && col < n && col % (F::LEFT + F::RIGHT) == F::LEFT;
  }

  // The holes in a warp's 16 rows; p is D's matrix, n the product's columns.
  template <class C>
  __device__ __forceinline__ static void fill_holes(typename C::Out* d, const Extents& p, int n,
                                                    const Tile& tile, int first_row) {
    if constexpr (kHeads && F::FILL) {
      constexpr int kChunk = 16 / sizeof(typename C::Out), kChunks = F::MID / kChunk;
      const int thread = ptx::thread_index(), lane = thread % 32, row = first_row + thread / 32 % 4 * 16;
#pragma unroll 1
      for (int col = tile.col; col < tile.col + kCols<C>; col += 64) {
        if (!behind_hole(col, n)) continue;
        typename C::Out* hole = d + (column(col) - F::MID);
#pragma unroll 1
        for (int i = lane; i < 16 * kChunks; i += 32)
          if (row + i / kChunks < p.m)
            *reinterpret_cast<uint4*>(hole + static_cast<i64>(row + i / kChunks) * p.n +
                                      i % kChunks * kChunk) = uint4{0, 0, 0, 0};
      }
    }
  }

  // The hole in front of a row's four columns.
  template <class Out>
  __device__ __forceinline__ static void fill_hole(Out* line, int col, int n) {
    if constexpr (kHeads && F::FILL) {
      if (!behind_hole(col, n)) return;
#pragma unroll 1
      for (int i = 16 / sizeof(Out); i <= F::MID; i += 16 / sizeof(Out))
        *reinterpret_cast<uint4*>(line + column(col) - i) = uint4{0, 0, 0, 0};
    }
  }
};

}  // namespace jdg
