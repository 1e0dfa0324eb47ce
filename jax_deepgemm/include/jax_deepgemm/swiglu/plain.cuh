// SwiGLU, or another activation, and its gradient, in the type of h: h [rows, 2 i] = gate | up, or as
// activation.cuh has it. The formulas are those of swiglu.cuh; computed in float32, rounded once.
//
//   activate       a warp: one piece of one row, HELD times eight features of a lane, all loaded before the
//                  first is stored. A grid: all pieces of some rows, then those of the next
//   activate_grad  a warp: one row, HELD times eight features of a lane at a time. Each lane sums what is the
//                  weight's gradient in the order of its features; then lanes exchange their sums, always in
//                  the same order, so that equal inputs give equal bits
//
// No shared memory, no barriers. Each number is read once and written once.
#pragma once

#include <jax_deepgemm/ptx/memory.cuh>
#include <jax_deepgemm/swiglu/activation.cuh>

namespace jdg {

// What a kernel is told at compile time; ops/swiglu/sm90.py writes it as `struct Config`.
// clang-format off
template <class C>
concept PlainConfig = requires {
  typename C::In;  // of h, act and their gradients: bf16, f16 or float
  C::WARPS;        // of a block of threads
  C::HELD;         // times eight features that a lane has at once
  C::WEIGHTED;     // bool: whether rows have weights
  C::ALIGNED;      // bool: whether rows have a multiple of 8 features, so that 8 numbers are moved at once
};
// clang-format on

// Rows of an operand: as many as of the result, or fewer, which then serve each matrix of a batch.
template <class T>
struct Lines {
  T* first;
  int rows;

  __device__ __forceinline__ i64 of(i64 row) const { return static_cast<u32>(row) % static_cast<u32>(rows); }
};

__device__ __forceinline__ bf16 rounded_to(float v, bf16) { return ptx::to_bf16(v); }
__device__ __forceinline__ float rounded_to(float v, float) { return v; }
__device__ __forceinline__ f16 rounded_to(float v, f16) { return {static_cast<u16>(ptx::pack_f16(v, 0.0f))}; }

__device__ __forceinline__ u32 packed_pair(float low, float high, bf16) { return ptx::pack_bf16(low, high); }
__device__ __forceinline__ u32 packed_pair(float low, float high, f16) { return ptx::pack_f16(low, high); }

// Eight neighbouring numbers of a row, of which `left` are inside.
template <class T, bool ALIGNED>
__device__ __forceinline__ void store_eight(T* at, const float (&v)[kWide], int left) {
  if constexpr (!ALIGNED) {
#pragma unroll
    for (int i = 0; i < kWide; ++i)
      if (i < left) at[i] = rounded_to(v[i], T{});
  } else if constexpr (is_same<T, float>) {
    if (left <= 0) return;
    reinterpret_cast<float4*>(at)[0] = {v[0], v[1], v[2], v[3]};
    reinterpret_cast<float4*>(at)[1] = {v[4], v[5], v[6], v[7]};
  } else {
    if (left <= 0) return;
    *reinterpret_cast<uint4*>(at) = {packed_pair(v[0], v[1], T{}), packed_pair(v[2], v[3], T{}),
                                     packed_pair(v[4], v[5], T{}), packed_pair(v[6], v[7], T{})};
  }
}

// Eight features from `col` on in a row of h.
template <PlainConfig C, Activation A>
__device__ __forceinline__ void load_features(Features<typename C::In, A>& of, const typename C::In* line,
                                              int width, int col) {
  const typename C::In* at = line + (A::INTERLEAVED ? 2 * col : col);
  of.template load<C::ALIGNED>(at, width, true, width - col);
}

template <PlainConfig C>
__device__ __forceinline__ float weight_of(const Lines<const float>& weights, i64 row) {
  if constexpr (!C::WEIGHTED) return 1.0f;
  return weights.first[weights.of(row)];
}

template <PlainConfig C, Activation A>
__device__ __forceinline__ void activate(const Lines<const typename C::In>& h,
                                         const Lines<const float>& weights, typename C::In* act, int rows,
                                         int width, int pieces) {
  const u32 group = blockIdx.x / static_cast<u32>(pieces), piece = blockIdx.x - group * pieces;
  const i64 row = static_cast<i64>(group) * C::WARPS + threadIdx.x / 32;
  if (row >= rows) return;
  const int first = static_cast<int>(piece) * 32 * C::HELD + static_cast<int>(threadIdx.x) % 32;
  const typename C::In* line = h.first + h.of(row) * width * kHalves<A>;

  Features<typename C::In, A> in[C::HELD];
#pragma unroll
  for (int k = 0; k < C::HELD; ++k) load_features<C, A>(in[k], line, width, (first + 32 * k) * kWide);
  const float weight = weight_of<C>(weights, row);
#pragma unroll
  for (int k = 0; k < C::HELD; ++k) {
    const int col = (first + 32 * k) * kWide;
    float v[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i)
      v[i] = Activated<A>(in[k].gate(i)).value * Activated<A>::factor(in[k].up(i)) * weight;
    store_eight<typename C::In, C::ALIGNED>(act + row * width + col, v, width - col);
  }
}

// The gradients of eight features' gate and up, where those lie in the row of h that begins at `line`.
template <PlainConfig C, Activation A>
__device__ __forceinline__ void store_gradients(typename C::In* line, const float (&gate)[kWide],
                                                const float (&up)[kWide], int width, int col) {
  using In = typename C::In;
  const int left = width - col;
  if constexpr (A::INTERLEAVED) {
    float low[kWide], high[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      low[i] = i % 2 ? up[i / 2] : gate[i / 2];
      high[i] = i % 2 ? up[kWide / 2 + i / 2] : gate[kWide / 2 + i / 2];
    }
    store_eight<In, C::ALIGNED>(line + 2 * col, low, 2 * left);
    store_eight<In, C::ALIGNED>(line + 2 * col + kWide, high, 2 * left - kWide);
  } else {
    store_eight<In, C::ALIGNED>(line + col, gate, left);
    if constexpr (kGated<A>) store_eight<In, C::ALIGNED>(line + width + col, up, left);
  }
}

template <PlainConfig C, Activation A>
__device__ __forceinline__ void activate_grad(const Lines<const typename C::In>& h,
                                              const Lines<const float>& weights,
                                              const Lines<const typename C::In>& dact, typename C::In* dh,
                                              float* dweight, int rows, int width) {
  using In = typename C::In;
  const i64 row = static_cast<i64>(blockIdx.x) * C::WARPS + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const In* line = h.first + h.of(row) * width * kHalves<A>;
  const In* given_line = dact.first + dact.of(row) * width;
  const float weight = weight_of<C>(weights, row);

  float sum = 0.0f;
  for (int start = 0; start < width; start += 32 * C::HELD * kWide) {
    Features<In, A> in[C::HELD];
    Chunk<In> given[C::HELD];
#pragma unroll
    for (int k = 0; k < C::HELD; ++k) {
      const int col = start + (32 * k + lane) * kWide;
      load_features<C, A>(in[k], line, width, col);
      load_chunk<In, C::ALIGNED>(given[k], given_line + col, true, width - col);
    }
#pragma unroll
    for (int k = 0; k < C::HELD; ++k) {
      float gate[kWide], up[kWide];
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        const Activated<A> f(in[k].gate(i));
        const float scaled = given[k][i] * weight, factor = f.factor(in[k].up(i));
        gate[i] = scaled * (factor * f.slope());
        up[i] = scaled * f.by_up(in[k].up(i));
        sum += given[k][i] * f.value * factor;
      }
      store_gradients<C, A>(dh + row * width * kHalves<A>, gate, up, width, start + (32 * k + lane) * kWide);
    }
  }
  if constexpr (C::WEIGHTED) {
#pragma unroll
    for (int half = 16; half > 0; half /= 2) sum += __shfl_xor_sync(kEveryLane, sum, half);
    if (lane == 0) dweight[row] = sum;
  }
}

}  // namespace jdg
