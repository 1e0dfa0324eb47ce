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

inline float to_float(bf16 v) { return __uint_as_float(static_cast<u32>(v.bits) << 16); }

// As mma_bf16 does, of numbers of f16: each is the sum of two of bf16, up to 2^-16 of it.
inline void mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  const auto part = [](u32 two, bool rest) {
    const auto number = [](u32 bits) { return static_cast<float>(__builtin_bit_cast(_Float16, u16(bits))); };
    const auto of = [rest](float v) { return rest ? v - to_float(to_bf16(v)) : v; };
    return pack_bf16(of(number(two & 0xFFFF)), of(number(two >> 16)));
  };
  for (int i = 0; i < 4; ++i) {
    const bool a_rest = i / 2, b_rest = i % 2;
    const u32 rows[4] = {part(a[0], a_rest), part(a[1], a_rest), part(a[2], a_rest), part(a[3], a_rest)};
    const u32 columns[2] = {part(b[0], b_rest), part(b[1], b_rest)};
    mma_bf16(d, rows, columns);
  }
}

}  // namespace jdg::ptx
