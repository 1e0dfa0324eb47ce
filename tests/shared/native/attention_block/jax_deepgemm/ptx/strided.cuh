// Where an operand lies, and its strides: the first in 20 bits, the others in 22 each, in units of 16 bytes.
#pragma once

#include <jax_deepgemm/ptx/wgmma.cuh>

namespace jdg::ptx {

template <int GROUP, int SLAB = 16>
struct StridedDescriptor {
  u64 all;
  explicit StridedDescriptor(u32 smem)
      : all(static_cast<u64>(SLAB / 16) << 42 | static_cast<u64>(GROUP / 16) << 20 | smem) {
    if (smem % 1024) std::abort();
  }
  u64 plus(int bytes) const { return all + bytes; }
};

}  // namespace jdg::ptx
