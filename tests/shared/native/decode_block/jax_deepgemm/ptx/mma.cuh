// Matrices of shared memory in registers, products of f16.
#pragma once

#include_next <jax_deepgemm/ptx/mma.cuh>

struct alignas(8) uint2 {
  unsigned x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __log2f(float v) { return std::log2(v); }

namespace jdg::ptx {

inline void prefetch(const void*) {}

// Row r of matrix m begins at the address of lane 8 m + r.
template <class Read>
void load_matrices(u32 (&to)[4], u32 address, const Read& read) {
  const int lane = threadIdx.x % 32;
  u32 rows[32];
  exchange(address, [&](unsigned other, u32 at) { rows[other] = at; });
  for (int m = 0; m < 4; ++m) {
    u32 two = 0;
    for (int e = 0; e < 2; ++e) {
      const auto [row, column] = read(lane, e);
      two |= static_cast<u32>(load_from<u16>(rows[8 * m + row] + 2 * column)) << 16 * e;
    }
    to[m] = two;
  }
}
inline void load_matrix_x4(u32 (&to)[4], u32 address) {
  load_matrices(to, address, [](int lane, int e) { return std::pair(lane / 4, lane % 4 * 2 + e); });
}
inline void load_matrix_x4_transposed(u32 (&to)[4], u32 address) {
  load_matrices(to, address, [](int lane, int e) { return std::pair(lane % 4 * 2 + e, lane / 4); });
}

inline void mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  const auto as_bf16 = [](u32 two) {  // of numbers that both types have
    const auto number = [](u16 bits) { return static_cast<float>(__builtin_bit_cast(_Float16, bits)); };
    return pack_bf16(number(two & 0xFFFF), number(two >> 16));
  };
  const u32 rows[4] = {as_bf16(a[0]), as_bf16(a[1]), as_bf16(a[2]), as_bf16(a[3])};
  const u32 columns[2] = {as_bf16(b[0]), as_bf16(b[1])};
  mma_bf16(d, rows, columns);
}

}  // namespace jdg::ptx
