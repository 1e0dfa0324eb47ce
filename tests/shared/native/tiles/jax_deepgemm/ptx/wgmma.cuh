// ptx/wgmma.cuh for CPU threads: each computes its own part of the product, of bytes as small integers.
#pragma once

#include <jax_deepgemm/ptx/tma.cuh>

namespace jdg::ptx {

struct Descriptor {
  u32 at;
  u64 plus(int bytes) const { return at + bytes; }
};
inline Descriptor k_major_descriptor(u32 smem) { return {smem}; }
inline Descriptor mn_major_descriptor(u32, u32) { std::_Exit(1); }

// 64 x 8 * COUNT / 4 x 32.
template <int COUNT>
void multiply(float (&d)[COUNT], u64 a, u64 b, bool accumulate) {
  const int row = thread_index() / 32 % 4 * 16 + thread_index() % 32 / 4, col = thread_index() % 4 * 2;
  for (int i = 0; i < COUNT; ++i) {
    const signed char* x = reinterpret_cast<signed char*>(shared) + a + (row + i / 2 % 2 * 8) * 128;
    const signed char* y = reinterpret_cast<signed char*>(shared) + b + (i / 4 * 8 + col + i % 2) * 128;
    int sum = 0;
    for (int k = 0; k < 32; ++k) sum += x[k] * y[k];
    d[i] = (accumulate ? d[i] : 0.0f) + sum;
  }
}

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int PENDING>
void wgmma_wait() {}
template <int COUNT>
void pin(float (&)[COUNT]) {}

}  // namespace jdg::ptx
