// ptx/tma.cuh for CPU threads: boxes of matrices, without swizzle; outside there are zeros.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <jax_deepgemm/ptx/memory.cuh>
#include <jax_deepgemm/ptx/types.cuh>

namespace jdg::ptx {

struct Matrix {
  const char* data;
  int element, cols, rows, box_cols, box_rows;  // element: bytes

  TensorMap map() const {
    TensorMap out;
    std::memcpy(out.opaque, this, sizeof *this);
    return out;
  }
};

inline void tma_load(u32 smem, const TensorMap& map, u32 bar, int x, int y, int) {
  Matrix m;
  std::memcpy(&m, map.opaque, sizeof m);
  if (x * m.element % 16 != 0) {  // faults on the device
    std::fprintf(stderr, "a box begins at column %d\n", x);
    std::_Exit(1);
  }
  for (int row = 0; row < m.box_rows; ++row)
    for (int col = 0; col < m.box_cols; ++col) {
      char* const to = shared + smem + (row * m.box_cols + col) * m.element;
      const int from_row = y + row, from_col = x + col;
      if (from_row >= 0 && from_row < m.rows && from_col >= 0 && from_col < m.cols)
        std::memcpy(to, m.data + (static_cast<long>(from_row) * m.cols + from_col) * m.element, m.element);
      else
        std::memset(to, 0, m.element);
    }
  barriers.at(bar).count(0, -m.box_rows * m.box_cols * m.element);
}
inline void tma_load_once(u32 smem, const TensorMap& map, u32 bar, int x, int y, int z) {
  tma_load(smem, map, bar, x, y, z);
}
inline void tma_load(u32, const TensorMap&, u32, int, int, int, int) { std::_Exit(1); }
inline void tma_load_once(u32, const TensorMap&, u32, int, int, int, int) { std::_Exit(1); }

}  // namespace jdg::ptx
