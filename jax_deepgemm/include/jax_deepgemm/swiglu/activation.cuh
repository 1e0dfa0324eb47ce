// What becomes of h between two GEMMs, as a policy of the kernels in swiglu.cuh.
//
// clang-format off
//   act = f(gate) * (up + SHIFT)         gate clipped to at most LIMIT, up to within +-LIMIT
//   silu   f(x) = x * sigmoid(ALPHA * x)
//   gelu   f(x) = x * sigmoid(2 sqrt(2 / pi) * (x + 0.044715 x^3)), which is its tanh form
//   relu2  f(x) = max(x, 0)^2, of h itself: there is no up
//
//   h, a row   gate | up     or, INTERLEAVED, gate up gate up ..     or, without up, gate
// clang-format on
//
// Arithmetic is that of ops/swiglu/reference.py but for the sigmoid, whose exp and division are the
// hardware's. Comparisons are written so that NaN passes them.
#pragma once

#include <jax_deepgemm/quantize/quantize.cuh>

namespace jdg {

enum class Function { kSilu, kGelu, kReluSquared };

// What a kernel is told at compile time; ops/quantize/sm90.py writes it as `struct Act`.
// clang-format off
template <class A>
concept Activation = requires {
  A::FUNCTION;     // Function: f
  A::LIMIT;        // where gate and up are clipped; kInfinity: they are not
  A::ALPHA;        // factor inside silu's sigmoid
  A::SHIFT;        // what is added to up
  A::INTERLEAVED;  // bool: whether gate and up take turns in a row of h
};
// clang-format on

template <Activation A>
constexpr bool kGated = A::FUNCTION != Function::kReluSquared;

// Columns of h, and of its gradient, for each feature.
template <Activation A>
constexpr int kHalves = kGated<A> ? 2 : 1;

// f of a gate that was clipped, and its slope.
template <Activation A>
struct Activated {
  static constexpr bool kClips = A::LIMIT < kInfinity;
  bool passes;
  float sigmoid, inner, value;  // inner: the slope of what the sigmoid is of

  __device__ __forceinline__ explicit Activated(float gate) : passes(!kClips || !(gate > A::LIMIT)) {
    constexpr float kLog2E = 1.4426950408889634f, kScale = 1.5957691216057308f, kCubic = 0.044715f;
    const float x = kClips ? ptx::min_nan(gate, A::LIMIT) : gate;
    if constexpr (A::FUNCTION == Function::kReluSquared) {
      sigmoid = x < 0.0f ? 0.0f : x;
      value = sigmoid * sigmoid;
    } else if constexpr (A::FUNCTION == Function::kGelu) {
      const float square = x * x;
      sigmoid = sigmoid_of(-kLog2E * kScale, x + kCubic * x * square);
      inner = kScale * (1.0f + 3.0f * kCubic * fminf(square, 256.0f));  // farther the sigmoid is 0 or 1
      value = x * sigmoid;
    } else {
      sigmoid = sigmoid_of(-kLog2E * A::ALPHA, x);
      inner = A::ALPHA;
      value = x * sigmoid;
    }
  }
  // df / dgate
  __device__ __forceinline__ float slope() const {
    float of = sigmoid + value * (1.0f - sigmoid) * inner;
    if constexpr (A::FUNCTION == Function::kReluSquared) of = 2.0f * sigmoid;
    return passes ? of : 0.0f;
  }
  // What f is multiplied by.
  __device__ __forceinline__ static float factor(float up) {
    if constexpr (kClips) up = ptx::max_nan(ptx::min_nan(up, A::LIMIT), -A::LIMIT);
    // Of clipped numbers also if it is 0: otherwise ptxas spills in the kernel of unaligned float32.
    if constexpr (kClips || A::SHIFT != 0.0f) up += A::SHIFT;
    return up;
  }
  // d(f * factor) / dup
  __device__ __forceinline__ float by_up(float up) const {
    if constexpr (kClips) return fabsf(up) > A::LIMIT ? 0.0f : value;
    return value;
  }

 private:
  __device__ __forceinline__ static float sigmoid_of(float scale, float x) {
    return ptx::rcp_approx(1.0f + ptx::ex2_approx(scale * x));
  }
};

// Gate and up of a thread's eight features.
template <class In, Activation A>
struct Features {
  Chunk<In> first, second;  // gate and up, or h as it lies

  // `line` is where the row's feature of this thread is in its gate half; afterwards in the next row's.
  template <bool ALIGNED>
  __device__ __forceinline__ void load(const In*& line, int width, bool inside, int left) {
    if constexpr (A::INTERLEAVED) {
      load_chunk<In, ALIGNED>(first, line, inside, 2 * left);
      load_chunk<In, ALIGNED>(second, line + kWide, inside, 2 * left - kWide);
      line += 2 * width;
    } else {
      load_chunk<In, ALIGNED>(first, line, inside, left);
      line += width;
      if constexpr (kGated<A>) {
        load_chunk<In, ALIGNED>(second, line, inside, left);
        line += width;
      }
    }
  }

  __device__ __forceinline__ float gate(int i) const {
    if constexpr (A::INTERLEAVED) return (i < kWide / 2 ? first : second)[2 * i % kWide];
    return first[i];
  }
  __device__ __forceinline__ float up(int i) const {
    if constexpr (A::INTERLEAVED) return (i < kWide / 2 ? first : second)[2 * i % kWide + 1];
    if constexpr (!kGated<A>) return 1.0f;
    return second[i];
  }
};

// The first four of a chunk; the others stay.
template <class T>
__device__ __forceinline__ void load_half(Chunk<T>& chunk, const T* at) {
  const uint2 two = *reinterpret_cast<const uint2*>(at);
  chunk.pairs[0] = two.x, chunk.pairs[1] = two.y;
}
__device__ __forceinline__ void load_half(Chunk<float>& chunk, const float* at) {
  const float4 four = *reinterpret_cast<const float4*>(at);
  chunk.v[0] = four.x, chunk.v[1] = four.y, chunk.v[2] = four.z, chunk.v[3] = four.w;
}

template <Activation A>
constexpr bool kApart = kGated<A> && !A::INTERLEAVED;

// What eight columns of the gradient of h are computed from: h and dact of their features.
template <class In, Activation A>
struct GradientInputs {
  Chunk<In> first, second, given;  // gate, up, dact; INTERLEAVED: h as it lies, nothing, four of dact

  __device__ __forceinline__ void clear() { first.clear(), second.clear(), given.clear(); }

  // Where gate and up are not apart: of columns from `col` on in a row's `line` of h and of dact.
  template <bool ALIGNED>
  __device__ __forceinline__ void load(const In* line, const In* dact, int width, int col, bool inside) {
    const int left = kHalves<A> * width - col;
    load_chunk<In, ALIGNED>(first, line + col, inside, left);
    if constexpr (!A::INTERLEAVED) {
      load_chunk<In, ALIGNED>(given, dact + col, inside, left);
    } else if constexpr (ALIGNED) {
      if (inside && left > 0) load_half(given, dact + col / 2);
    } else {
#pragma unroll
      for (int i = 0; i < kWide / 2; ++i)
        if (inside && 2 * i < left) given.set(i, dact[col / 2 + i]);
    }
  }

  // Whether column i is a gate's, of those from `col` on.
  __device__ __forceinline__ static bool of_gate(int i, int col, int width) {
    if constexpr (A::INTERLEAVED) return i % 2 == 0;
    return !kGated<A> || col + i < width;
  }
  __device__ __forceinline__ float gate(int i) const { return first[A::INTERLEAVED ? i / 2 * 2 : i]; }
  __device__ __forceinline__ float up(int i) const {
    if constexpr (A::INTERLEAVED) return first[i / 2 * 2 + 1];
    if constexpr (!kGated<A>) return 1.0f;
    return second[i];
  }
  __device__ __forceinline__ float dact(int i) const { return given[A::INTERLEAVED ? i / 2 : i]; }
};

}  // namespace jdg
