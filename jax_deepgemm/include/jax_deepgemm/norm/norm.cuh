// Layer and RMS norms of rows, of sums of a row, its residual and a bias, in the type of the rows and in FP8
// with 1x128 scales. Each number is read once and written once.
//
// clang-format off
//   a row            LANES threads hold it in registers, CHUNKS times eight columns each. All loads of x and
//                    the residual are issued before the first is used
//   a half warp      16 CHUNKS times eight neighbouring columns: CHUNKS whole tiles of 128, each with a scale
//   a block          ROWS rows of a warp each, or one row of several warps
//   sums             of a lane in the order of its columns, of a warp by shuffles, of warps through shared
//                    memory, in their order: equal inputs give equal bits
// clang-format on
//
// s = x + residual + bias in float32 is rounded to the type of x, and what is normalised is that rounded s.
// Moments are float32: the mean of squares, or the mean and then the mean of squared differences. FP8 is made
// of the rounded norm, by the arithmetic of quantize_tile.cuh, bit for bit.
//
// Hazards: where a row has several warps, all threads of a block reach both barriers, as the block has no
// other row; each sum has words of its own in shared memory, so that none is overwritten while it is read.
#pragma once

#include <jax_deepgemm/paged_append/stored.cuh>
#include <jax_deepgemm/quantize/quantize_tile.cuh>
#include <jax_deepgemm/swiglu/plain.cuh>

namespace jdg {

// What a kernel is told at compile time; ops/norm/kernels.py writes it as `struct Config`. Fp8, UE8M0 and
// MIN_AMAX are those of quantize_tile.cuh.
// clang-format off
template <class C>
concept NormConfig = requires {
  typename C::In;      // of x, the residual, the norm and the sum: bf16, f16 or float
  typename C::Vector;  // of bias, gamma and beta
  C::LANES;            // threads of a row, whole warps
  C::ROWS;             // of a block of threads; 1 where LANES is more than a warp
  C::CHUNKS;           // times eight columns that a thread has: a power of two
  C::EPS;              // added to the mean of squares
  C::LAYER;            // bool: whether the mean is taken off
  C::RESIDUAL;         // bool: whether there is one; likewise
  C::BIAS; C::GAMMA; C::BETA;
  C::NORMED;           // bool: whether the norm is written, ...
  C::QUANTIZED;        // ... its FP8 ...
  C::SUMMED;           // ... and the sum
  C::ALIGNED;          // bool: whether rows have a multiple of 8 columns, so that 8 numbers are moved at once
};
// clang-format on

struct PortableE4m3 : E4m3 {
  __device__ __forceinline__ static u16 pack(float low, float high) {
#if __CUDA_ARCH__ >= 890
    return ptx::pack_e4m3(low, high);
#else
    return static_cast<u16>(to_e4m3(low) | to_e4m3(high) << 8);
#endif
  }
};

// Pointers to what a kernel does not read or write are null.
template <class C>
struct NormInputs {
  const typename C::In *x, *residual;             // [rows, cols]
  const typename C::Vector *bias, *gamma, *beta;  // [cols]
};
template <class C>
struct NormResults {
  typename C::In* normed;  // [rows, cols]
  u8* values;              // [rows, cols]
  float* scales;           // [rows, ceil(cols / 128)]
  typename C::In* sum;     // [rows, cols]
};

__device__ __forceinline__ void set_chunk(Chunk<float>& chunk, const float (&v)[kWide]) {
#pragma unroll
  for (int i = 0; i < kWide; ++i) chunk.v[i] = v[i];
}
template <class T>
__device__ __forceinline__ void set_chunk(Chunk<T>& chunk, const float (&v)[kWide]) {
#pragma unroll
  for (int i = 0; i < kWide / 2; ++i) chunk.pairs[i] = packed_pair(v[2 * i], v[2 * i + 1], T{});
}

// Where a thread's part of a row is.
template <NormConfig C>
struct NormPart {
  i64 row;
  int first, cols;  // first: column of chunk 0

  __device__ __forceinline__ NormPart(int cols) : cols(cols) {
    const int thread = static_cast<int>(threadIdx.x) % C::LANES;
    row = static_cast<i64>(blockIdx.x) * C::ROWS + static_cast<int>(threadIdx.x) / C::LANES;
    first = thread / 16 * C::CHUNKS * kTile + thread % 16 * kWide;
  }
  __device__ __forceinline__ int col(int k) const { return first + k * kTile; }
  __device__ __forceinline__ int left(int k) const { return cols - col(k); }
  __device__ __forceinline__ i64 at(int k) const { return row * cols + col(k); }
};

// Of all threads of a row; `warps` has a word for each of its warps.
template <NormConfig C>
__device__ __forceinline__ float row_sum(float v, float* warps) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) v += __shfl_xor_sync(kEveryLane, v, apart);
  if constexpr (C::LANES > 32) {
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();
    v = warps[0];
#pragma unroll
    for (int w = 1; w < C::LANES / 32; ++w) v += warps[w];
  }
  return v;
}

// The rounded sum of the row, its residual and the bias, in registers.
template <NormConfig C>
__device__ __forceinline__ void load_sum(Chunk<typename C::In> (&s)[C::CHUNKS], const NormInputs<C>& in,
                                         const NormPart<C>& part) {
  using In = typename C::In;
  Chunk<In> other[C::RESIDUAL ? C::CHUNKS : 1];
#pragma unroll
  for (int k = 0; k < C::CHUNKS; ++k) load_chunk<In, C::ALIGNED>(s[k], in.x + part.at(k), true, part.left(k));
  if constexpr (C::RESIDUAL) {
#pragma unroll
    for (int k = 0; k < C::CHUNKS; ++k)
      load_chunk<In, C::ALIGNED>(other[k], in.residual + part.at(k), true, part.left(k));
  }
  if constexpr (C::RESIDUAL || C::BIAS) {
#pragma unroll
    for (int k = 0; k < C::CHUNKS; ++k) {
      Chunk<typename C::Vector> bias;
      if constexpr (C::BIAS)
        load_chunk<typename C::Vector, C::ALIGNED, true>(bias, in.bias + part.col(k), true, part.left(k));
      float v[kWide];
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        v[i] = s[k][i];
        if constexpr (C::RESIDUAL) v[i] += other[k][i];
        if constexpr (C::BIAS) v[i] += bias[i];
      }
      set_chunk(s[k], v);
    }
  }
}

struct Moments {
  float mean, inverse;  // inverse: of the deviation
};

template <NormConfig C>
__device__ __forceinline__ Moments moments_of(const Chunk<typename C::In> (&s)[C::CHUNKS],
                                              const NormPart<C>& part, float (&warps)[2][C::LANES / 32]) {
  const float count = static_cast<float>(part.cols);
  float mean = 0.0f, squares = 0.0f;
  if constexpr (C::LAYER) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < C::CHUNKS; ++k) {
#pragma unroll
      for (int i = 0; i < kWide; ++i) sum += s[k][i];  // columns outside are zeros
    }
    mean = row_sum<C>(sum, warps[0]) / count;
  }
#pragma unroll
  for (int k = 0; k < C::CHUNKS; ++k) {
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      const float v = s[k][i] - mean;
      if (!C::LAYER || i < part.left(k)) squares += v * v;
    }
  }
  return {mean, 1.0f / sqrtf(row_sum<C>(squares, warps[1]) / count + C::EPS)};
}

// The rounded norm in place of s.
template <NormConfig C>
__device__ __forceinline__ void normalise(Chunk<typename C::In> (&s)[C::CHUNKS], const NormInputs<C>& in,
                                          const NormPart<C>& part, const Moments& of) {
#pragma unroll
  for (int k = 0; k < C::CHUNKS; ++k) {
    Chunk<typename C::Vector> gamma, beta;
    if constexpr (C::GAMMA)
      load_chunk<typename C::Vector, C::ALIGNED, true>(gamma, in.gamma + part.col(k), true, part.left(k));
    if constexpr (C::BETA)
      load_chunk<typename C::Vector, C::ALIGNED, true>(beta, in.beta + part.col(k), true, part.left(k));
    float v[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      v[i] = (C::LAYER ? s[k][i] - of.mean : s[k][i]) * of.inverse;
      if constexpr (C::GAMMA) v[i] *= gamma[i];
      if constexpr (C::BETA) v[i] += beta[i];
      if (i >= part.left(k)) v[i] = 0.0f;  // else its NaN, or its mean, might count in a tile's maximum
    }
    set_chunk(s[k], v);
  }
}

template <NormConfig C>
__device__ __forceinline__ void store_chunks(const Chunk<typename C::In> (&s)[C::CHUNKS], typename C::In* to,
                                             const NormPart<C>& part) {
#pragma unroll
  for (int k = 0; k < C::CHUNKS; ++k) {
    float v[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) v[i] = s[k][i];
    store_eight<typename C::In, C::ALIGNED>(to + part.at(k), v, part.left(k));
  }
}

// FP8 of the norm: lane l of a half warp has the scale of its tile l % CHUNKS.
template <NormConfig C>
__device__ __forceinline__ void store_quantized(Chunk<typename C::In> (&y)[C::CHUNKS],
                                                const NormResults<C>& out, const NormPart<C>& part) {
#pragma unroll
  for (int k = 0; k < C::CHUNKS; ++k) y[k].infinities_to_nan();
  Maxima<C::CHUNKS> maxima;
  find_maxima<true>(maxima, y);
  float (&inverse)[C::CHUNKS] = maxima.row;
  const float scale = scale_of<C>(combine_lanes(inverse, [](float a, float b) { return fmaxf(a, b); }));
  const int lane = static_cast<int>(threadIdx.x) % 16;
  const int tile = part.first / kTile + lane, across = ceil_div(part.cols, kTile);
  if (lane < C::CHUNKS && tile < across) out.scales[part.row * across + tile] = scale;
  spread_lanes(inverse, ptx::rcp_rn(scale));
#pragma unroll
  for (int k = 0; k < C::CHUNKS; ++k) {
    float v[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) v[i] = ptx::mul_ftz(y[k][i], inverse[k]);
    const uint2 bytes = {pack_four<typename C::Fp8>(v[0], v[1], v[2], v[3]),
                         pack_four<typename C::Fp8>(v[4], v[5], v[6], v[7])};
    store_bytes<C::ALIGNED>(out.values + part.at(k), bytes, part.left(k));
  }
}

template <NormConfig C>
__device__ __forceinline__ void norm(const NormInputs<C>& in, const NormResults<C>& out, int rows, int cols) {
  static_assert(C::LANES % 32 == 0 && (C::LANES == 32 || C::ROWS == 1) && C::CHUNKS <= 16);
  __shared__ float warps[2][C::LANES / 32];
  const NormPart<C> part(cols);
  if (part.row >= rows) return;
  Chunk<typename C::In> s[C::CHUNKS];
  load_sum<C>(s, in, part);
  if constexpr (C::SUMMED) store_chunks<C>(s, out.sum, part);
  normalise<C>(s, in, part, moments_of<C>(s, part, warps));
  if constexpr (C::NORMED) store_chunks<C>(s, out.normed, part);
  if constexpr (C::QUANTIZED) store_quantized<C>(s, out, part);
}

}  // namespace jdg
