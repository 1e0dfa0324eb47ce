// Loads of boxes of rank 4 or 5 into shared memory, done at once: elements outside are zeros, rows of 128
// bytes are swizzled. What the hardware refuses ends the program.
#pragma once

#include <jax_deepgemm/ptx/memory.cuh>

namespace jdg::ptx {

// What lies in a TensorMap's bytes: sizes innermost first, strides in bytes.
struct Box {
  const char* from;
  int element, swizzle;  // bytes
  int box[5];
  long long dims[5], strides[5];
};

inline TensorMap make_map(const Box& box) {
  TensorMap map;
  static_assert(sizeof(Box) <= sizeof(TensorMap));
  std::memcpy(&map, &box, sizeof box);
  return map;
}

inline void tma_load(u32 smem, const TensorMap& map, u32 bar, int x, int y, int z, int w, int v = 0) {
  Box m;
  std::memcpy(&m, &map, sizeof m);
  if (x * m.element % 16 || smem % (m.swizzle ? 1024 : 128)) std::abort();
  if (m.swizzle && m.box[0] * m.element != 128) std::abort();
  const int at[5] = {x, y, z, w, v};
  u32 to = smem;
  for (int i = 0; i < m.box[0] * m.box[1] * m.box[2] * m.box[3] * m.box[4]; ++i, to += m.element) {
    const char* from = m.from;
    bool inside = true;
    for (int axis = 0, rest = i; axis < 5; rest /= m.box[axis], ++axis) {
      const long long where = at[axis] + rest % m.box[axis];
      inside &= where >= 0 && where < m.dims[axis];
      from += where * m.strides[axis];
    }
    char* const place = shared + (m.swizzle ? to ^ (to / 128 % 8 * 16) : to);
    if (place + m.element > shared + sizeof shared) std::abort();
    inside ? std::memcpy(place, from, m.element) : std::memset(place, 0, m.element);
  }
  barriers.at(bar).count(0, -static_cast<int>(to - smem));
}

}  // namespace jdg::ptx
