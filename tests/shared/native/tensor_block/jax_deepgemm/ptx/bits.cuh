// Bytes of words.
#pragma once

#include <jax_deepgemm/ptx/types.cuh>

namespace jdg::ptx {

inline u32 permute(u32 low, u32 high, u32 which) {
  u32 bytes = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 nibble = which >> 4 * i & 15;
    const u32 byte = (nibble & 4 ? high : low) >> 8 * (nibble & 3) & 255;
    bytes |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return bytes;
}

}  // namespace jdg::ptx
