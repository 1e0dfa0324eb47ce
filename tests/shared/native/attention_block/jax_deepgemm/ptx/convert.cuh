// Products of pairs of bfloat16.
#pragma once

#include <jax_deepgemm/ptx/fp8.cuh>

namespace jdg::ptx {

inline u32 multiply_pairs(u32 a, u32 b) {
  const auto number = [](u32 bits) { return __uint_as_float(bits << 16); };
  return pack_bf16(number(a & 0xFFFF) * number(b & 0xFFFF), number(a >> 16) * number(b >> 16));
}

}  // namespace jdg::ptx
