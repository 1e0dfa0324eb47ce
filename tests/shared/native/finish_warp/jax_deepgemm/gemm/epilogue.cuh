// What finish.cuh takes of the kernel around it, for one warp of a CPU (../../../swiglu_warp).
#pragma once

#include <jax_deepgemm/ptx/fp8.cuh>
#include <jax_deepgemm/ptx/memory.cuh>

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }

namespace jdg {

struct Extents {
  int m, n;
};
struct Tile {
  int row, col, batch;
};
template <class C>
constexpr int kCols = C::COLS;

// PTX ISA 9.7.15.5, m64nNk*.
struct Fragment {
  int row, col;
  Fragment() {
    const int thread = ptx::thread_index();
    row = thread / 32 % 4 * 16 + thread % 32 / 4, col = thread % 4 * 2;
  }
};

}  // namespace jdg
