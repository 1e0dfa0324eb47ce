// The real one, but for its instruction.
#pragma once

#include <jax_deepgemm/ptx/bits.cuh>
#include <jax_deepgemm/ptx/convert.cuh>

namespace jdg::ptx {

inline u32 multiply_halves(u32 a, u32 b) {
  const auto number = [](u32 bits) {
    return static_cast<float>(__builtin_bit_cast(_Float16, static_cast<u16>(bits)));
  };
  return pack_f16(number(a & 0xFFFF) * number(b & 0xFFFF), number(a >> 16) * number(b >> 16));
}

}  // namespace jdg::ptx
