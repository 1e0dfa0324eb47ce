// The gradient of logits [tokens, EXPERTS] from that of the weights of chosen experts.
//
// clang-format off
//   lane i     the i-th chosen expert: its logit, its score; the gradient of the score (through the sum of all, where
//              weights were divided by it) times the score's slope, into a row of zeros in shared memory
//   all lanes  the row to memory, VECTOR neighbours at once; of a softmax: score * (row - sum of score * row)
// clang-format on
//
// A warp per token, or fewer lanes where there are fewer experts. Only a softmax reads all logits.
//
//   shared memory of a token:  row[EXPERTS] float32
//
// Hazard: lanes behind the last token compute it once more and store nothing. An id outside the experts,
// which `route` never gives, counts for nothing.
#pragma once

#include <jax_deepgemm/route/scores.cuh>

namespace jdg {

// ops/route/sm90.py writes it.
// clang-format off
template <class C>
concept RouteGradientConfig = requires {
  typename C::In;   // dtype of the logits and of their gradient
  C::SCORE;         // Score: what the logits became
  C::EXPERTS;       // columns of the logits
  C::TOP_K;         // experts that were chosen, at most LANES
  C::LANES;         // lanes of a token, a power of two
  C::VECTOR;        // logits that are moved at once
  C::RENORMALIZE;   // bool: whether weights were divided by their sum
};
// clang-format on

constexpr int kRouteGradientThreads = 128;

__device__ __forceinline__ void from_float(float v, float& to) { to = v; }
__device__ __forceinline__ void from_float(float v, bf16& to) { to = ptx::to_bf16(v); }

template <RouteGradientConfig C>
struct GradientRow {
  alignas(16) float v[C::EXPERTS];
};

// The gradient of a lane's score, from that of its weight.
template <RouteGradientConfig C>
__device__ __forceinline__ float of_score(float score, float by, float scale) {
  by *= scale;
  if constexpr (!C::RENORMALIZE) return by;
  const float inverse = 1.0f / (sum_of_lanes<C::LANES>(score) + kTiny);
  by *= inverse;
  return by - sum_of_lanes<C::LANES>(score * inverse * by);
}

template <RouteGradientConfig C>
__device__ __forceinline__ void route_gradient(const typename C::In* logits, const int* ids, const float* by,
                                               typename C::In* gradient, int tokens, float scale) {
  using In = typename C::In;
  using Numbers = Run<In, C::VECTOR>;
  constexpr int kTokens = kRouteGradientThreads / C::LANES, kStep = C::LANES * C::VECTOR;
  constexpr int kRuns = ceil_div(C::EXPERTS, kStep);
  __shared__ GradientRow<C> shared[kTokens];
  const int lane = threadIdx.x % C::LANES, mine = blockIdx.x * kTokens + threadIdx.x / C::LANES;
  const i64 token = min(mine, tokens - 1);
  const In* x = logits + token * C::EXPERTS;
  float (&row)[C::EXPERTS] = shared[threadIdx.x / C::LANES].v;

  Softmax softmax;
  float score[C::SCORE == Score::kSoftmax ? kRuns * C::VECTOR : 1];
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    const int at = run * kStep + lane * C::VECTOR;
    const bool inside = kRuns * kStep == C::EXPERTS || at < C::EXPERTS;
    Numbers numbers;
    if (C::SCORE == Score::kSoftmax && inside) numbers = *reinterpret_cast<const Numbers*>(x + at);
#pragma unroll
    for (int i = 0; i < C::VECTOR; ++i) {
      if (inside) row[at + i] = 0.0f;
      if constexpr (C::SCORE == Score::kSoftmax)
        score[run * C::VECTOR + i] = inside ? ptx::to_float(numbers.v[i]) : -kInfinity;
    }
  }
  if constexpr (C::SCORE == Score::kSoftmax) softmax = Softmax::of<C::LANES>(score);
  __syncwarp();

  const i64 slot = token * C::TOP_K + lane;
  const int id = lane < C::TOP_K ? ids[slot] : -1;
  const bool chosen = static_cast<u32>(id) < C::EXPERTS;
  const float logit = chosen ? ptx::to_float(x[id]) : 0.0f;
  const float own = chosen ? score_of<C::SCORE>(logit, softmax) : 0.0f;
  const float pull = of_score<C>(own, chosen ? by[slot] : 0.0f, scale);
  if (chosen) row[id] = pull * slope_of<C::SCORE>(logit, own);
  const float others =
      C::SCORE == Score::kSoftmax ? sum_of_lanes<C::LANES>(chosen ? pull * own : 0.0f) : 0.0f;
  __syncwarp();

#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    const int at = run * kStep + lane * C::VECTOR;
    if (mine >= tokens || (kRuns * kStep != C::EXPERTS && at >= C::EXPERTS)) continue;
    Numbers numbers;
#pragma unroll
    for (int i = 0; i < C::VECTOR; ++i) {
      float value = row[at + i];
      if constexpr (C::SCORE == Score::kSoftmax)
        value = score_of<C::SCORE>(score[run * C::VECTOR + i], softmax) * (value - others);
      from_float(value, numbers.v[i]);
    }
    *reinterpret_cast<Numbers*>(gradient + token * C::EXPERTS + at) = numbers;
  }
}

}  // namespace jdg
