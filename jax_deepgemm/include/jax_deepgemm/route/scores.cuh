// What a router's scores are, and their slopes, in float32: every function within 3 units in the last place.
#pragma once

#include <jax_deepgemm/ptx/fp8.cuh>
#include <jax_deepgemm/ptx/memory.cuh>
#include <jax_deepgemm/ptx/warp.cuh>

namespace jdg {

enum class Score { kSoftmax, kSigmoid, kSqrtSoftplus, kReady };

constexpr u32 kEveryLane = 0xFFFFFFFF;
constexpr float kInfinity = __builtin_bit_cast(float, 0x7F800000u);
constexpr float kTiny = 1e-20f;  // joins the sum that weights are divided by

// N neighbouring numbers of a row, moved at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Run {
  T v[N];
};

// Sum over a token's lanes, in an order that is always the same.
template <int LANES>
__device__ __forceinline__ float sum_of_lanes(float v) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) v += __shfl_xor_sync(kEveryLane, v, step);
  return v;
}

template <int LANES>
__device__ __forceinline__ float max_of_lanes(float v) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(kEveryLane, v, step));
  return v;
}

// What the softmax of one logit takes of all of them. A NaN or an infinity makes `inverse` NaN, and so every
// score of the token.
struct Softmax {
  float most = 0.0f, inverse = 1.0f;

  // x: those of this lane; where it has fewer, -infinity behind them.
  template <int LANES, int COUNT>
  __device__ __forceinline__ static Softmax of(const float (&x)[COUNT]) {
    float most = x[0], sum = 0.0f;
#pragma unroll
    for (int i = 1; i < COUNT; ++i) most = fmaxf(most, x[i]);
    most = max_of_lanes<LANES>(most);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sum += expf(x[i] - most);
    return {most, ptx::rcp_approx(sum_of_lanes<LANES>(sum))};
  }
};

// From here down sqrt(log(1 + exp(x))) is exp(x / 2), to the last bit.
constexpr float kFar = -17.0f;

template <Score SCORE>
__device__ __forceinline__ float score_of(float x, const Softmax& softmax) {
  if constexpr (SCORE == Score::kSoftmax) return expf(x - softmax.most) * softmax.inverse;
  if constexpr (SCORE == Score::kSigmoid) return ptx::rcp_approx(1.0f + expf(-x));
  if constexpr (SCORE == Score::kSqrtSoftplus) {
    const float near = sqrtf(fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))));
    return x < kFar ? expf(0.5f * x) : near;
  }
  return x;
}

// The derivative of a token's score by its own logit; of the softmax without what the other logits do.
template <Score SCORE>
__device__ __forceinline__ float slope_of(float x, float score) {
  if constexpr (SCORE == Score::kSigmoid) {
    const float tail = expf(-fabsf(x)), most = ptx::rcp_approx(1.0f + tail);
    return tail * most * most;  // score * (1 - score), where neither is lost
  }
  if constexpr (SCORE == Score::kSqrtSoftplus)
    return x < kFar ? 0.5f * score : 0.5f * ptx::rcp_approx(1.0f + expf(-x)) / score;
  return 1.0f;
}

}  // namespace jdg
