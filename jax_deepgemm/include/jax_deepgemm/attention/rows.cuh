// Running softmax of rows whose scores come in pieces (in powers of two: scores are multiplied by log2(e)).
#pragma once

#include <jax_deepgemm/ptx/fp8.cuh>

namespace jdg {

constexpr float kNothing = __builtin_bit_cast(float, 0xFF800000u);  // minus infinity
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.693147180559945309417f;

// The largest score so far and the sum of 2^(score - largest); nothing seen: -inf and 0.
struct Running {
  float largest = kNothing, sum = 0.0f;
};

// What the largest is subtracted as: nothing was seen, nothing is subtracted.
__device__ __forceinline__ float subtrahend(float largest) { return largest == kNothing ? 0.0f : largest; }

// What sums of before count for once `now` is the largest.
__device__ __forceinline__ float weight_of(float before, float now) {
  return ptx::ex2_approx(before - subtrahend(now));
}

// The natural logarithm of the denominator.
__device__ __forceinline__ float log_sum(const Running& row) {
  return row.sum != 0.0f ? (row.largest + __log2f(row.sum)) * kLn2 : kNothing;
}

// With one more logit, that of a sink, which has no value.
__device__ __forceinline__ Running with_sink(const Running& row, float sink) {
  const float logit = sink * kLog2E, largest = fmaxf(row.largest, logit);
  return {largest, row.sum * weight_of(row.largest, largest) + weight_of(logit, largest)};
}

}  // namespace jdg
