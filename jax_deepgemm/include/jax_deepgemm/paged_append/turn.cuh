// Cosine and sine of a rotary embedding's angles, of any size, to a unit or so in the last place of float32.
//
// The multiple of a quarter turn is taken off in float64, where it is exact enough for all angles up to 2^31;
// what is left is at most pi / 4, and there the Taylor series are.
#pragma once

namespace jdg {

struct Turn {
  float cos, sin;
};

__device__ __forceinline__ Turn turn_by(float angle) {
  constexpr double kQuarters = 0.63661977236758134, kQuarter = 1.5707963267948966,
                   kRest = 6.123233995736766e-17;  // of 2 / pi, pi / 2, and what that lacks
  const double n = rint(angle * kQuarters);
  const float r = static_cast<float>(fma(-n, kRest, fma(-n, kQuarter, static_cast<double>(angle))));
  const float r2 = r * r;
  float sin = fmaf(r2, 1.0f / 362880, -1.0f / 5040);
  sin = fmaf(r2, sin, 1.0f / 120);
  sin = fmaf(r2, sin, -1.0f / 6);
  sin = fmaf(r2 * r, sin, r);
  float cos = fmaf(r2, -1.0f / 3628800, 1.0f / 40320);
  cos = fmaf(r2, cos, -1.0f / 720);
  cos = fmaf(r2, cos, 1.0f / 24);
  cos = fmaf(r2, cos, -0.5f);
  cos = fmaf(r2, cos, 1.0f);
  const int quarter = static_cast<int>(static_cast<long long>(n)) & 3;
  const float x = quarter & 1 ? sin : cos, y = quarter & 1 ? cos : sin;
  return {quarter == 1 || quarter == 2 ? -x : x, quarter & 2 ? -y : y};
}

}  // namespace jdg
